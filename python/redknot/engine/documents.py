"""The offline part: documents computed once, found again, and computed anew when evicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from torch import Tensor

from redknot._memory import OutOfPages
from redknot.engine.needs import needed_tokens, rows_are_known
from redknot.engine.runner import HeadRules, Runner, TokenSlots
from redknot.engine.segment_tiers import Outline, SegmentTiers
from redknot.errors import BudgetError, UnknownDocumentError
from redknot.recovery import FlopCounter, Placement, PromptLayout, RecoveryPlan
from redknot.store import MemoryStore, Missed, Segment, segment_key, stored_parts
from redknot.store.layout import NeededTokens

__all__ = ["DocumentCache", "Found"]

_ID_LENGTH = 16  # hex digits of the key that name a document to the user


@dataclass(frozen=True)
class Found:
    """A segment, where it came from for this request, and why.

    `source` is "cached" (it was in the page pool), "loaded" (from a tier below) or "computed".
    """

    segment: Segment
    source: Literal["cached", "loaded", "computed"]
    reason: str

    @property
    def computed(self) -> bool:
        """Whether something had to be computed for it."""
        return self.source == "computed"


class DocumentCache:
    """Documents of one engine: token ids by id, their segments in the store.

    Parameters
    ----------
    runner : Runner
        Computes what is missing.
    store : MemoryStore
        Holds the segments in the page pool.
    tiers : SegmentTiers
        Where else they may be found.
    fingerprint : str
        Of the model.
    prefix_ids : np.ndarray
        The prompt's prefix; may be empty.
    behind_prefix : bool
        Whether documents are computed behind the prefix, or alone from position 0.
    salt : str
        A tenant's; see `segment_key`.
    """

    def __init__(
        self,
        runner: Runner,
        store: MemoryStore,
        tiers: SegmentTiers,
        *,
        fingerprint: str,
        salt: str = "",
        prefix_ids: np.ndarray,
        behind_prefix: bool,
    ) -> None:
        self._runner = runner
        self.store = store
        self.tiers = tiers
        self._fingerprint, self._salt = fingerprint, salt
        self.prefix_ids = prefix_ids
        self._context_ids = prefix_ids if behind_prefix else prefix_ids[:0]
        self._token_ids: dict[str, np.ndarray] = {}
        self._keys: dict[str, dict[int | None, str]] = {}  # by the layer of the hidden states

    # --- documents by id -------------------------------------------------------------------------

    def register(self, token_ids: np.ndarray) -> str:
        """Remember a document and return its id; the same tokens have the same id."""
        key = self._segment_key(self._context_ids, token_ids)
        document = key[:_ID_LENGTH]
        self._token_ids[document] = token_ids
        self._keys.setdefault(document, {None: key})
        return document

    def token_ids(self, document: str) -> np.ndarray:
        """Token ids [num_tokens] of a document.

        Raises
        ------
        UnknownDocumentError
            For an id that `register` did not return.
        """
        try:
            return self._token_ids[document]
        except (KeyError, TypeError):
            raise UnknownDocumentError(
                f"unknown document id {document!r}; Engine.add returns the id of a document"
            ) from None

    def is_cached(self, document: str) -> bool:
        """Whether the document's segment lies in the store."""
        self.token_ids(document)
        return any(key in self.store for key in self._keys[document].values())

    def offline_seconds(self, document: str) -> float:
        """Time that caching the document took; a missing one is computed."""
        self.token_ids(document)
        for key in self._keys[document].values():
            if key in self.store:
                return self.store.peek(key).offline_seconds
        return self.find(document).segment.offline_seconds

    def is_stored(self, document: str, *, hidden_layer: int | None = None) -> bool:
        """Whether the document's segment lies in the page pool or in a tier below."""
        token_ids, layer = self.token_ids(document), self._choose_layer(document, hidden_layer)
        key = self._keys[document][layer]
        if key in self.store or not self.tiers.store:
            return key in self.store
        return self.tiers.contains(Outline(key, len(token_ids), len(self._context_ids), layer))

    def outline(self, document: str) -> Outline:
        """What is known of a document's segment before it is found."""
        token_ids = self.token_ids(document)
        return Outline(self._keys[document][None], len(token_ids), len(self._context_ids))

    def read_ahead(
        self,
        documents: Sequence[str],
        hidden_layer: int | None,
        plan: RecoveryPlan,
        layout: PromptLayout,
        rules: HeadRules,
    ) -> Sequence[NeededTokens | None]:
        """Begin to read what a request needs of its documents; returns it, as `find` takes it."""
        if not self.tiers.store:
            return [None] * len(documents)
        # Where rows enter from stored hidden states or are chosen on the way, all of it is read.
        if hidden_layer is not None or not rows_are_known(plan):
            for document in documents:
                self.prefetch(document, hidden_layer=hidden_layer)
            return [None] * len(documents)
        # A kernel may touch all of a page of which it sees a part.
        page_size = self._runner.pool.page_size
        needed = [n.whole_pages(page_size) for n in needed_tokens(plan, layout, rules)]
        for document, tokens in zip(documents, needed, strict=True):
            self.prefetch(document, hidden_layer=hidden_layer, needed=tokens)
        return needed

    def keys(self, documents: Collection[str]) -> set[str]:
        """Keys that a request over `documents` must keep: theirs and the prefix's."""
        keys = {key for document in documents for key in self._keys[document].values()}
        return keys | {self._prefix_key()}

    def chain(self, documents: Sequence[str]) -> list[str]:
        """Keys of the prefix and of `documents`, in order: what a recovered chain is known by."""
        return [self._prefix_key(), *(self._keys[document][None] for document in documents)]

    def clear(self) -> None:
        """Forget every document and drop every segment, the prefix's included."""
        self.store.clear()
        self.tiers.store.forget_prefetched()
        self._token_ids.clear()
        self._keys.clear()

    # --- segments --------------------------------------------------------------------------------

    def prefix(self, keep: Collection[str] = ()) -> Found | None:
        """The prefix's segment, computed if need be; None when there is no prefix."""
        if not len(self.prefix_ids):
            return None
        return self._find(self._prefix_key(), self.prefix_ids[:0], self.prefix_ids, keep)

    def find(
        self,
        document: str,
        keep: Collection[str] = (),
        progress: Callable[[], None] | None = None,
        *,
        hidden_layer: int | None = None,
        needed: NeededTokens | None = None,
    ) -> Found:
        """A document's segment, loaded or computed if need be; those in `keep` are not evicted.

        Of a segment in a tier only what is `needed` is read (None: all of it).

        With `hidden_layer` it has the hidden states at that layer's input; where the document is
        cached without them, they alone are computed, and its pages stay what they are.

        Raises
        ------
        BudgetError
            When the pool cannot hold it; nothing was changed.
        """
        token_ids, keys = self.token_ids(document), self._keys[document]
        hidden_layer = self._choose_layer(document, hidden_layer)
        key = keys[hidden_layer]
        others = [other for other in keys.values() if other != key and other in self.store]
        if key not in self.store and others:
            found = self._add_hidden(others[0], key, token_ids, hidden_layer, keep)
            if found is not None:
                return found
        return self._find(key, self._context_ids, token_ids, keep, progress, hidden_layer, needed)

    def prefetch(
        self,
        document: str,
        *,
        hidden_layer: int | None = None,
        needed: NeededTokens | None = None,
    ) -> None:
        """Begin to read on a thread what `find` would load for the same arguments."""
        token_ids = self.token_ids(document)
        if self.tiers.store and not self.is_cached(document):
            hidden_layer = self._choose_layer(document, hidden_layer)
            key = self._keys[document][hidden_layer]
            outline = Outline(key, len(token_ids), len(self._context_ids), hidden_layer)
            self.tiers.prefetch(outline, needed)

    def _choose_layer(self, document: str, hidden_layer: int | None) -> int | None:
        """Which of a document's segments serves; its key is known afterwards."""
        keys = self._keys[document]
        if hidden_layer is None:  # any of them has K and V
            return next((at for at, key in keys.items() if key in self.store), None)
        if hidden_layer not in keys:
            keys[hidden_layer] = self._segment_key(
                self._context_ids, self.token_ids(document), hidden_layer
            )
        return hidden_layer

    def _prefix_key(self) -> str:
        return self._segment_key(self.prefix_ids[:0], self.prefix_ids)

    def _segment_key(
        self, context_ids: np.ndarray, token_ids: np.ndarray, hidden_layer: int | None = None
    ) -> str:
        decoder = self._runner.decoder
        return segment_key(
            fingerprint=self._fingerprint,
            dtype=decoder.dtype,
            inv_freq=decoder.inv_freq.cpu().numpy(),
            prefix_ids=context_ids,
            token_ids=token_ids,
            stored=stored_parts(hidden_layer),
            salt=self._salt,
        )

    def _find(
        self,
        key: str,
        context_ids: np.ndarray,
        token_ids: np.ndarray,
        keep: Collection[str],
        progress: Callable[[], None] | None = None,
        hidden_layer: int | None = None,
        needed: NeededTokens | None = None,
    ) -> Found:
        segment = self.store.get(key)
        if segment is not None:
            where = self.tiers.complete(segment, needed)
            if where == "":
                return Found(segment, "cached", f"found in memory ({segment.origin})")
            if where is not None:
                return Found(segment, "loaded", f"found in memory in part, {where}")
            self._discard(segment)
        evicted = self.store.was_evicted(key)
        outline = Outline(key, len(token_ids), len(context_ids), hidden_layer)
        keep = {*keep, self._prefix_key()}
        loaded = self.tiers.load(outline, needed, partial(self._take_pages, keep=keep))
        if not isinstance(loaded, Missed):
            self.store.put(loaded[0])
            return Found(loaded[0], "loaded", loaded[1])
        context = self._context(context_ids, keep)
        segment = self._compute(key, context, context_ids, token_ids, keep, progress, hidden_layer)
        origin = f"computed in {segment.offline_seconds:.2f} s"
        origin += f"; {loaded.reason}" if loaded.reason else ""
        segment = replace(segment, origin=origin)
        self.store.put(segment)
        self.tiers.save(segment)
        reason = "evicted to make room, computed anew" if evicted else "first use, computed now"
        if loaded.reason:
            reason += f" ({loaded.reason})"
        return Found(segment, "computed", reason)

    def _discard(self, segment: Segment) -> None:
        self.store.discard(segment.key)
        self.tiers.forget(segment)

    def _take_pages(self, num_tokens: int, first_position: int, keep: Collection[str]) -> int:
        """Pages for a new segment, others evicted for it; BudgetError where that is no help."""
        while True:
            try:
                return self._runner.pool.allocator.create_segment(num_tokens, first_position)
            except OutOfPages as missing:
                self.make_room(keep, missing, f"a document of {num_tokens} tokens")

    def _context(self, context_ids: np.ndarray, keep: Collection[str]) -> Segment | None:
        """What documents are computed behind."""
        if not len(context_ids):
            return None
        return self._find(self._prefix_key(), context_ids[:0], context_ids, keep).segment

    def make_room(self, keep: Collection[str], missing: OutOfPages, what: str) -> None:
        """Evict one segment that the request does not need, or raise BudgetError."""
        evicted = self.store.evict_one(keep)
        if evicted is not None:
            self.tiers.forget(evicted)
            return
        stats = self._runner.pool.allocator.stats()
        short = missing.pages_needed - missing.pages_free
        wanted = (stats["num_pages"] + short) * stats["bytes_per_page"]
        raise BudgetError(
            f"{what} needs {missing.pages_needed} pages, but only {missing.pages_free} of "
            f"{stats['num_pages']} are free and nothing can be evicted; "
            f"raise kv_budget to at least {wanted:,} bytes"
        ) from missing

    def _add_hidden(
        self,
        old_key: str,
        key: str,
        token_ids: np.ndarray,
        hidden_layer: int | None,
        keep: Collection[str],
    ) -> Found | None:
        """Compute the hidden states of a cached document, over the K and V that it has.

        None where K and V were read in part, and the rest cannot be read any more.
        """
        old = self.store.get(old_key)
        assert old is not None and hidden_layer is not None
        if self.tiers.complete(old, None) is None:
            self._discard(old)
            return None
        context = self._context(self._context_ids, keep)
        attached = [item.handle for item in (context, old) if item is not None]
        started = time.perf_counter()
        hidden, flops = self._encode(
            attached, token_ids, old.first_position, slots=None, hidden_layer=hidden_layer
        )
        segment = replace(
            old,
            key=key,
            hidden=hidden,
            hidden_layer=hidden_layer,
            offline_flops=old.offline_flops + flops,
            offline_seconds=old.offline_seconds + time.perf_counter() - started,
        )
        self.store.replace(old_key, segment)
        self.tiers.save(segment)
        reason = f"cached without hidden states of layer {hidden_layer}, they were computed now"
        return Found(segment, "computed", reason)

    def _compute(
        self,
        key: str,
        context: Segment | None,
        context_ids: np.ndarray,
        token_ids: np.ndarray,
        keep: Collection[str],
        progress: Callable[[], None] | None,
        hidden_layer: int | None,
    ) -> Segment:
        """Dense prefill of a segment behind its context; K and V go straight to its pages."""
        started = time.perf_counter()
        allocator, first = self._runner.pool.allocator, len(context_ids)
        handle = self._take_pages(len(token_ids), first, keep)
        attached = [handle] if context is None else [context.handle, handle]
        try:
            hidden, flops = self._encode(
                attached,
                token_ids,
                first,
                slots=lambda layer: allocator.segment_slots(handle, layer),
                hidden_layer=hidden_layer,
                progress=progress,
            )
        except BaseException:
            allocator.release_segment(handle)
            raise
        seconds = time.perf_counter() - started
        self.tiers.computed(flops, seconds)
        return Segment(
            key=key,
            handle=handle,
            first_position=first,
            num_tokens=len(token_ids),
            offline_flops=flops,
            offline_seconds=seconds,
            hidden=hidden,
            hidden_layer=hidden_layer,
        )

    def _encode(
        self,
        attached: Sequence[int],
        token_ids: np.ndarray,
        first_position: int,
        *,
        slots: TokenSlots | None,
        hidden_layer: int | None,
        progress: Callable[[], None] | None = None,
    ) -> tuple[Tensor | None, float]:
        """Hidden states, if wanted, and FLOPs of a pass over the last of some segments."""
        decoder, allocator = self._runner.decoder, self._runner.pool.allocator
        counter = FlopCounter(decoder.shape)
        windows = decoder.native_windows()
        rules = HeadRules(np.ones_like(windows, dtype=bool), windows, np.zeros_like(windows))
        session = allocator.create_session(rules.windows, rules.sinks)
        try:
            for handle in attached:
                allocator.append_segment(session, handle)
            hidden = self._runner.encode(
                session,
                token_ids,
                first_position,
                rules,
                slots=slots,
                counter=counter,
                hidden_layer=hidden_layer,
                progress=progress,
            )
        finally:
            allocator.release_session(session)
        return hidden, sum(counter.close().values())


def place(prefix_end: int, segments: Sequence[Segment | Outline]) -> tuple[Placement, ...]:
    """Documents one behind the other behind the prefix; the first may be at home, so exact."""
    placements, begin = [], prefix_end
    for number, segment in enumerate(segments):
        end = begin + segment.num_tokens
        offset = begin - segment.first_position
        placements.append(Placement(begin, end, offset, exact=number == 0 and offset == 0))
        begin = end
    return tuple(placements)
