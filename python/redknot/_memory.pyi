"""Pages, head segments and session rows of one device (compiled; see `SegmentAllocator`)."""

from collections.abc import Sequence
from typing import TypeAlias, TypedDict, type_check_only

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Int32: TypeAlias = NDArray[np.int32]
_Int64: TypeAlias = NDArray[np.int64]

def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Ask for huge pages under memory that was not written to yet; the system may say no."""

class OutOfPages(RuntimeError):
    """A call needs more pages than are free; it changed nothing.

    Attributes
    ----------
    pages_needed : int
        Pages the call takes, less those it gives back itself: `pages_needed - pages_free` more
        free pages let it pass.
    pages_free : int
        Pages that were free.
    """

    pages_needed: int
    pages_free: int

@type_check_only
class AllocatorStats(TypedDict):
    """What `SegmentAllocator.stats` returns.

    Each page counts once: `num_free_pages + segment_pages + session_global_pages +
    session_local_pages == num_pages`.
    """

    num_pages: int
    num_free_pages: int
    segment_pages: int  # held by segments, shared or not
    session_global_pages: int  # held by sessions alone, in a row of a global head
    session_local_pages: int  # held by sessions alone, in rows of local heads
    shared_pages: int  # of those: held by more than one owner (segment or session)
    swapped_pages: int  # not in the pool: contents that `swap_out` left with the caller
    num_segments: int
    num_sessions: int
    bytes_per_page: int

class SegmentAllocator:
    """Pages, head segments and session rows of one device; safe to use from several threads.

    A *page* holds `page_size` token slots, K and V, of one KV head of one layer. A *segment* is a
    run of tokens whose KV was computed once; it owns a list of pages per (layer, KV head). A
    *session* has one *row* per (layer, KV head): an ordered list of references to pages. Rows
    share the pages of segments and forks; who writes gets a page of its own first.

    A *slot* is `page * page_size + index in the page`. The allocator never touches page contents
    (but see `poison`): calls return the slots to write and the page copies to execute.

    Parameters
    ----------
    num_layers, num_kv_heads : int
        Shape of the model's KV cache.
    num_pages : int
        The whole budget.
    page_size : int
        Token slots per page.
    bytes_per_page : int
        K and V together; only reported by `stats`.
    storage : sequence of (pointer, page_stride_bytes, page_bytes)
        Host memory regions that hold the pages, page p at `pointer + p * page_stride_bytes`. The
        memory must outlive the allocator.
    poison : bool, optional
        Fill freed pages with 0xFF bytes (NaN in fp32, bf16 and fp16) in `storage`. By default as
        the extension was built (on in Debug builds), if there is storage.

    Raises
    ------
    ValueError
        Here and in every method: an argument that breaks a rule, such as an id that is unknown or
        already released. Nothing has changed then.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        num_pages: int,
        page_size: int,
        bytes_per_page: int,
        storage: Sequence[tuple[int, int, int]] = ...,
        poison: bool | None = None,
    ) -> None: ...
    @property
    def poisons_freed_pages(self) -> bool:
        """Whether freed pages are filled with NaN."""

    @property
    def hole_page(self) -> int:
        """The page that stands for every page a segment has not, in sessions that attach it.

        -1 until there is need of it; never written by the allocator's word, and never free again.
        """

    def create_segment(
        self, num_tokens: int, first_position: int, present: ArrayLike | None = None
    ) -> int:
        """Take the pages of a segment: ceil(num_tokens / page_size) per (layer, KV head).

        Parameters
        ----------
        num_tokens : int
            At least 1.
        first_position : int
            Position that the keys' rotation gives to the first token.
        present : bool [num_layers, num_kv_heads, pages], optional
            Which of its pages it has from the beginning; default: all of them.

        Returns
        -------
        int
            The segment's id; ids are never used again.

        Raises
        ------
        OutOfPages
        """

    def drop_segment_pages(self, segment: int, pages: ArrayLike) -> int:
        """Let pages [num_layers, num_kv_heads, pages of a row] go; returns how many became free.

        Sessions that share them keep them; one that attaches the segment later has the hole there.
        """

    def restore_segment_pages(self, segment: int, pages: ArrayLike) -> None:
        """Take new pages where `pages` names some that the segment has not.

        Raises
        ------
        OutOfPages
        """

    def release_segment(self, segment: int) -> None:
        """Give up the segment; pages that sessions share stay until those let go."""

    def segment_slots(self, segment: int, layer: int) -> _Int64:
        """Slots [num_tokens, num_kv_heads] of a segment's tokens in one layer; -1: no page."""

    def create_session(self, windows: ArrayLike, sinks: ArrayLike) -> int:
        """Start an empty session.

        Parameters
        ----------
        windows : integers [num_layers, num_kv_heads]
            How many of the last tokens a local head sees, the current one included; -1: all.
        sinks : integers [num_layers, num_kv_heads]
            How many of the first tokens a local head keeps besides.

        Returns
        -------
        int
            The session's id; ids are never used again.
        """

    def release_session(self, session: int) -> None:
        """End the session; its pages are freed unless a segment or a fork holds them."""

    def fork_session(self, session: int) -> int:
        """Start a session that shares every page of another one, until either writes."""

    def session_length(self, session: int) -> int:
        """Tokens of the session, expired ones included."""

    def append_segment(self, session: int, segment: int) -> None:
        """Put a segment's tokens at the session's end, in every row, without a copy or a page.

        Its keys get the rotation offset `session_length - first_position`. Tokens appended behind
        it start a page of their own.
        """

    def append_tokens(
        self, sessions: ArrayLike, num_tokens: ArrayLike, expire_first: bool = False
    ) -> _Int32:
        """Make room for new tokens (rotation offset 0) in every row of some sessions.

        Parameters
        ----------
        sessions : integers [num_sessions]
            Each at most once.
        num_tokens : integers [num_sessions]
            New tokens of each session, 0 allowed.
        expire_first : bool
            Drop what `expire` would drop first, so that this call can use it (decode). Without,
            rows keep it for queries inside the documents (prefill).

        Returns
        -------
        ndarray of int32 [num_copies, 2]
            Page copies (source, destination) to execute before anything is written.

        Raises
        ------
        OutOfPages
            No session has changed, nor has any page expired.
        """

    def append_layer(self, sessions: ArrayLike, num_tokens: ArrayLike, layer: int) -> None:
        """Make room for a first prompt in one layer of empty sessions; layers come in order.

        With `expire_layer` behind each layer's attention, the local heads of one layer alone hold a
        whole prompt. Until the last layer came, the sessions can only be read, truncated, forked
        and released. Atomic over the sessions.

        Raises
        ------
        OutOfPages
        """

    def expire_layer(self, session: int, layer: int) -> int:
        """Free what no later token sees of one layer; returns how many pages became free."""

    def layerwise_pages(self, sessions: ArrayLike, num_tokens: ArrayLike) -> int:
        """Return the most pages that empty sessions hold at once during such a prompt."""

    def tail_slots(self, session: int, layer: int, num_tokens: int) -> _Int64:
        """Slots [num_tokens, num_kv_heads] of the last tokens; -1 where not held."""

    def make_writable(
        self,
        session: int,
        requests: Sequence[tuple[ArrayLike, ArrayLike]],
        keep_contents: bool = False,
    ) -> _Int32:
        """Make the pages of some tokens private to the session, so that they can be overwritten.

        Positions and rotation offsets of the pages stay. A page whose tokens are all requested is
        replaced without a copy, unless `keep_contents`.

        Parameters
        ----------
        session : int
        requests : sequence of (head_mask, positions)
            head_mask [num_layers, num_kv_heads], bool or integers, names rows, each row in one
            request at most; positions [n], sorted and unique, names tokens. Tokens that a row has
            expired are ignored.
        keep_contents : bool
            Copy every page that is replaced: not all of the tokens will be written, or they are
            read first.

        Returns
        -------
        ndarray of int32 [num_copies, 2]
            Page copies (source, destination) to execute before anything is written.

        Raises
        ------
        OutOfPages
        """

    def position_slots(self, session: int, layer: int, positions: ArrayLike) -> _Int64:
        """Slots [num_positions, num_kv_heads] of sorted, unique positions; -1 where not held."""

    def expire(self, session: int) -> int:
        """Drop the pages that no later query of a local head can see.

        Those without a sink position whose last token lies at or before
        `session_length - window`.

        Returns
        -------
        int
            How many pages became free.
        """

    def truncate(self, session: int, length: int) -> bool:
        """Give back the tokens from position `length` on.

        Returns
        -------
        bool
            False when a local head has already expired what the shorter session would see;
            nothing has changed then.
        """

    def change_rules(self, session: int, windows: ArrayLike, sinks: ArrayLike) -> int:
        """Give every row another window and sink, and drop what it no longer sees, for good.

        Parameters
        ----------
        session : int
        windows, sinks : integers [num_layers, num_kv_heads]
            As `create_session` takes them.

        Returns
        -------
        int
            How many pages became free.

        Raises
        ------
        ValueError
            Also where a row has expired tokens that its new rule would see; nothing has changed.
        """

    def growth_pages(self, sessions: ArrayLike, num_tokens: ArrayLike) -> int:
        """Count the pages that decoding `num_tokens` more in each session can come to hold.

        An upper bound, beyond the pages held now; nothing is taken.
        """

    def exclusive_pages(self, sessions: ArrayLike) -> _Int32:
        """Pages [n] that nobody but these sessions holds, rising: what `swap_out` can free."""

    def swap_out(self, sessions: ArrayLike, pages: ArrayLike) -> _Int32:
        """Free pages of some sessions; their contents are with the caller from now on.

        A session with swapped pages can only be released, swapped, and asked for its length and
        pages, until `swap_in`.

        Parameters
        ----------
        sessions : integers [num_sessions]
        pages : integers [n]
            Of `exclusive_pages(sessions)`, rising. The caller has copied them out before.

        Returns
        -------
        ndarray of int32 [n]
            A slot number for each page; small ones, used again once nobody needs them.
        """

    def swap_in(self, session: int) -> _Int32:
        """Take a page for each swapped one of a session; forks swapped with it share it again.

        Returns
        -------
        ndarray of int32 [n, 2]
            (slot, page): whose contents to write where. The slots are free.

        Raises
        ------
        OutOfPages
        """

    def grow(self, num_pages: int, storage: Sequence[tuple[int, int, int]] = ...) -> None:
        """Have `num_pages` pages from now on, at least as many as before; none moves.

        `storage` is where all of them lie, as for the constructor.
        """

    def rows(self, sessions: ArrayLike, layer: int) -> tuple[_Int32, _Int32]:
        """Rows of one layer, ordered by session, then KV head.

        Returns
        -------
        row_indptr : ndarray of int32 [num_sessions * num_kv_heads + 1]
            Row r has the references `page_refs[row_indptr[r]:row_indptr[r + 1]]`.
        page_refs : ndarray of int32 [num_refs, 4]
            Page, position of its first token, valid slots, rotation offset; by rising position.
        """

    def session_pages(self, session: int) -> int:
        """Distinct pages that the session holds, shared ones too."""

    def session_private_pages(self, session: int) -> int:
        """Distinct pages that nobody but the session holds."""

    def session_swapped_pages(self, session: int) -> int:
        """Pages that `swap_in` would take for the session."""

    def free_pages(self) -> int:
        """Pages that nobody holds."""

    def stats(self) -> AllocatorStats:
        """Who holds how many pages, counted exactly; costs time proportional to all references."""
