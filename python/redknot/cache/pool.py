"""The page pool of one device: K and V page tensors and the allocator that owns their pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redknot import _memory, ops
from redknot.cache.page_memory import empty_pages
from redknot.cache.page_selection import PageSelector, select_pages
from redknot.cache.swap import SwapSpace
from redknot.errors import BudgetError, InputError

__all__ = ["KVPool", "bytes_per_page", "out_of_pages"]


_SEEN = 1e4  # of values that nobody should see, where that is tested


def bytes_per_page(page_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page: the K and the V of `page_size` slots of one KV head of one layer."""
    return 2 * page_size * head_dim * dtype.itemsize


def _new_pages(like: Tensor, num_pages: int) -> Tensor:
    """Page tensor [num_pages, page_size, head_dim], not written to."""
    try:
        return empty_pages((num_pages, *like.shape[1:]), like.dtype, like.device)
    except RuntimeError as error:  # also torch.OutOfMemoryError
        num_bytes = 2 * num_pages * like.shape[1:].numel() * like.element_size()
        raise BudgetError(
            f"{like.device} has no {num_bytes:,} bytes for a pool of {num_pages} pages"
        ) from error


def out_of_pages(needed: int, free: int) -> _memory.OutOfPages:
    """Return what a call of the allocator raises that needs more pages than are free."""
    error = _memory.OutOfPages(f"{needed} pages are needed, {free} are free")
    error.pages_needed, error.pages_free = needed, free
    return error


def _check_kernels(like: Tensor) -> None:
    """Raise InputError unless attention has a kernel for pages like these: on CUDA not all have.

    The operator says so itself when it is called without queries.
    """
    if like.device.type == "cpu":
        return
    nothing = torch.empty(0, dtype=torch.int32, device=like.device)
    zero = torch.zeros(1, dtype=torch.int32, device=like.device)
    q = like.new_empty((0, 1, like.shape[-1]))
    try:
        ops.seg_paged_attention(
            q, like, like, zero, nothing.view(0, 4), zero, nothing, nothing, nothing
        )
    except RuntimeError as error:
        raise InputError(str(error).strip().splitlines()[0]) from None


class KVPool:
    """A fixed budget of pages, shared by every layer, head, segment and session of a device.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
        Shape of the model's KV cache.
    num_pages : int
        The whole budget; one page holds K and V of `page_size` tokens of one (layer, KV head).
    page_size : int
        Token slots per page.
    dtype, device : torch.dtype, torch.device
        Of the page tensors `k_cache`, `v_cache` [num_pages, page_size, head_dim].
    poison_freed_pages : bool, optional
        Fill freed pages with NaN (CPU only); by default as the extension was built.

    Raises
    ------
    InputError
        When attention has no kernel for such pages on `device`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        poison_freed_pages: bool | None = None,
    ) -> None:
        self.page_size = page_size
        self.page_bytes = bytes_per_page(page_size, head_dim, dtype)
        self.num_kv_heads = num_kv_heads
        self.device = torch.device(device)
        like = torch.empty((0, page_size, head_dim), dtype=dtype, device=self.device)
        _check_kernels(like)
        self.k_cache, self.v_cache = _new_pages(like, num_pages), _new_pages(like, num_pages)
        self._swap = SwapSpace(self.k_cache)
        self._has_clean_hole = False
        self.allocator = _memory.SegmentAllocator(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_pages=num_pages,
            page_size=page_size,
            bytes_per_page=self.page_bytes,
            storage=self._storage(),
            poison=poison_freed_pages,
        )
        if self.allocator.poisons_freed_pages:  # pages that were never used must not be read either
            self.k_cache.fill_(torch.nan)
            self.v_cache.fill_(torch.nan)

    def _storage(self) -> list[tuple[int, int, int]]:
        """Where the pages lie, for an allocator that poisons them; nothing off the host."""
        if self.device.type != "cpu":
            return []
        page_bytes = self.page_bytes // 2
        return [(t.data_ptr(), page_bytes, page_bytes) for t in (self.k_cache, self.v_cache)]

    def grow(self, num_pages: int) -> None:
        """Have `num_pages` pages from now on; sessions and segments stay as they are.

        The page tensors are replaced by larger ones, their contents copied once.
        """
        old = self.k_cache, self.v_cache
        num_old = len(self.k_cache)
        larger = [_new_pages(pages, num_pages) for pages in old]
        for new, present in zip(larger, old, strict=True):
            new[:num_old] = present
            if self.allocator.poisons_freed_pages:
                new[num_old:] = torch.nan
        self.k_cache, self.v_cache = larger
        self.allocator.grow(num_pages, self._storage())

    # --- segments --------------------------------------------------------------------------------

    def create_segment(
        self, num_tokens: int, first_position: int, present: np.ndarray | None = None
    ) -> int:
        """Take a segment's pages, or those of `present` [num_layers, num_kv_heads, pages] alone.

        Raises
        ------
        redknot._memory.OutOfPages
            When the pool cannot take them; nothing was changed.
        """
        handle = self.allocator.create_segment(num_tokens, first_position, present)
        self._clean_hole()
        return handle

    def drop_segment_pages(self, handle: int, pages: np.ndarray) -> int:
        """Let pages [num_layers, num_kv_heads, pages] of a segment go; returns how many are free.

        Nothing may look at them in sessions that attach the segment later; see `_memory`.
        """
        freed = self.allocator.drop_segment_pages(handle, pages)
        self._clean_hole()
        return freed

    def _clean_hole(self) -> None:
        page = self.allocator.hole_page
        if page >= 0 and not self._has_clean_hole:
            self._has_clean_hole = True
            self.clean(torch.tensor([page], device=self.device))

    def clean(self, pages: Tensor) -> None:
        """Make pages (int64) that nobody should see harmless: kernels may touch what they mask.

        They are zero; where freed pages are poisoned, their values are so large instead that a look
        at them would show.
        """
        self.k_cache.index_fill_(0, pages, 0.0)
        seen = _SEEN if self.allocator.poisons_freed_pages else 0.0
        self.v_cache.index_fill_(0, pages, seen)

    # --- preemption ------------------------------------------------------------------------------

    def swap_out(self, sessions: Sequence[int]) -> int:
        """Move the pages that only these sessions hold to host memory; returns how many.

        What they share with others stays in the pool. The sessions cannot be read or written
        until `swap_in`; a session that shares pages with another one to be moved should be given
        in the same call.
        """
        pages = self.allocator.exclusive_pages(list(sessions))
        if not len(pages):
            return 0
        index = self._index(pages)
        contents = self.k_cache[index], self.v_cache[index]
        self._swap.put(self.allocator.swap_out(list(sessions), pages), *contents)
        return len(pages)

    def swap_in(self, session: int) -> int:
        """Bring a session's pages back, bit by bit the same; returns how many.

        Raises
        ------
        redknot._memory.OutOfPages
            When the pool cannot take them; nothing was changed.
        """
        moves = self.allocator.swap_in(session)
        if len(moves):
            index = self._index(moves[:, 1])
            self.k_cache[index], self.v_cache[index] = self._swap.get(moves[:, 0], self.device)
        if not self.allocator.stats()["swapped_pages"]:
            self._swap.clear()
        return len(moves)

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def copy(self, copies: np.ndarray) -> None:
        """Execute the page copies [n, 2] (source, destination) that the allocator asked for."""
        if len(copies):
            ops.copy_pages(self.k_cache, self.v_cache, self._index(copies))

    def write(self, k: Tensor, v: Tensor, slots: np.ndarray | Tensor) -> None:
        """Write k, v [num_tokens, num_heads, head_dim] to `slots` [num_tokens, num_heads].

        Pages hold values, not what these were computed from: no gradient leads back.
        """
        slots = slots if isinstance(slots, Tensor) else self._index(slots)
        ops.write_pages(k.detach(), v.detach(), self.k_cache, self.v_cache, slots)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [num_tokens, num_heads, head_dim] at `slots`; keys as they are stored."""
        return self.k_cache.flatten(0, 1)[slots], self.v_cache.flatten(0, 1)[slots]

    def attend(
        self,
        q: Tensor,
        sessions: Sequence[int],
        layer: int,
        *,
        cu_seqlens_q: Tensor,
        q_positions: Tensor,
        row_window: Tensor,
        row_sink: Tensor,
        inv_freq: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        selectors: Sequence[PageSelector | None] = (),
    ) -> Tensor:
        """Attention of q [num_tokens, num_q_heads, head_dim] over the sessions' rows of a layer.

        `cu_seqlens_q` [num_sessions + 1] and `q_positions` [num_tokens] are int32, `row_window`
        and `row_sink` [num_sessions * num_kv_heads] int32; returns a tensor like q. `selectors`,
        one for each session, say which pages retrieval heads read.
        """
        row_indptr, page_refs = self.allocator.rows(list(sessions), layer)
        if any(selectors):
            row_indptr, page_refs = select_pages(
                selectors,
                sessions,
                cu_seqlens_q.diff().tolist(),
                layer,
                q,
                self.k_cache,
                row_indptr,
                page_refs,
                softmax_scale=softmax_scale,
                softcap=softcap,
                inv_freq=inv_freq,
            )
        out, _ = self.attend_rows(
            q,
            row_indptr,
            page_refs,
            cu_seqlens_q=cu_seqlens_q,
            q_positions=q_positions,
            row_window=row_window,
            row_sink=row_sink,
            inv_freq=inv_freq,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )
        return out

    def attend_rows(
        self,
        q: Tensor,
        row_indptr: np.ndarray,
        page_refs: np.ndarray,
        *,
        cu_seqlens_q: Tensor,
        q_positions: Tensor,
        row_window: Tensor,
        row_sink: Tensor,
        inv_freq: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attention over any rows of pages; see `redknot.ops.seg_paged_attention`."""
        return ops.seg_paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            self._index(row_indptr),
            self._index(page_refs),
            cu_seqlens_q,
            q_positions,
            row_window,
            row_sink,
            inv_freq=inv_freq,
            softmax_scale=softmax_scale,
            softcap=softcap,
            return_lse=return_lse,
        )
