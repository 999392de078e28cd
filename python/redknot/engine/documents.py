"""The offline part: documents computed once, found again, and computed anew when evicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from redknot._memory import OutOfPages
from redknot.engine.document_keys import DocumentKeys
from redknot.engine.found import Found, LostPagesError
from redknot.engine.needs import DocumentNeed, needs_of
from redknot.engine.offline import OfflinePass
from redknot.engine.runner import HeadRules, Runner
from redknot.engine.segment_tiers import Outline, SegmentTiers
from redknot.errors import BudgetError
from redknot.recovery import Placement, PromptLayout, RecoveryPlan
from redknot.store import MemoryStore, Missed, Segment

__all__ = ["DocumentCache"]


class DocumentCache(DocumentKeys):
    """Documents of one engine, and their segments in the store.

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
        super().__init__(
            runner.decoder,
            fingerprint=fingerprint,
            salt=salt,
            prefix_ids=prefix_ids,
            behind_prefix=behind_prefix,
        )
        self._runner = runner
        self._offline = OfflinePass(runner)
        self.store = store
        self.tiers = tiers

    # --- what is known of them --------------------------------------------------------------------

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
        *,
        all_at_once: bool,
    ) -> list[DocumentNeed]:
        """Begin to read what a request needs of its documents; returns it, as `find` takes it.

        With `all_at_once` nothing is left for `read_picked`.
        """
        # A kernel may touch all of a page of which it sees a part.
        needs = needs_of(plan, layout, rules, self._runner.pool.page_size)
        if all_at_once or not self.tiers.store:
            needs = [DocumentNeed(need.all) for need in needs]
        for document, need in zip(documents, needs, strict=True):
            self.prefetch(document, hidden_layer=hidden_layer, need=need)
        return needs

    def read_picked(
        self,
        found: Sequence[Found],
        session: int,
        picked: Mapping[int, np.ndarray],
        plan: RecoveryPlan,
        layout: PromptLayout,
        rules: HeadRules,
    ) -> list[Found]:
        """Read what rows need that a plan has picked (see `needs_of`), of documents of a session.

        Where the session has copies of pages that were empty so far, the copies are filled too.

        Raises
        ------
        LostPagesError
            When it could not be read.
        """
        needs = needs_of(plan, layout, rules, self._runner.pool.page_size, picked)
        read = []
        for item, need, document in zip(found, needs, layout.documents, strict=True):
            missing = self.tiers.parts.not_valid(item.segment.handle, need.now)
            where = self.tiers.complete(item.segment, need, self._hold)
            if where is None:
                self._discard(item.segment)
                raise LostPagesError(item.segment.key)
            if missing is not None:
                self._fill_copies(item.segment, missing, session, document)
                item = replace(item, reason=f"{item.reason}, then for the rows picked {where}")
            read.append(item)
        return read

    def _fill_copies(
        self, segment: Segment, pages: NDArray[np.bool_], session: int, document: Placement
    ) -> None:
        """Copy pages of a segment to where a session has pages of its own for them."""
        pool = self._runner.pool
        positions = np.arange(document.begin, document.end, pool.page_size)
        copies = []
        for layer in np.flatnonzero(pages.any(axis=(1, 2))).tolist():
            theirs = pool.allocator.segment_slots(segment.handle, layer)[:: pool.page_size]
            own = pool.allocator.position_slots(session, layer, positions)
            differ = pages[layer].T & (own >= 0) & (own != theirs)
            copies.append(np.stack([theirs[differ], own[differ]], axis=1) // pool.page_size)
        pool.copy(np.concatenate(copies).astype(np.int32))

    def clear(self) -> None:
        """Forget every document and drop every segment, the prefix's included."""
        self.store.clear()
        self.tiers.store.forget_prefetched()
        self.forget()

    # --- segments --------------------------------------------------------------------------------

    def prefix(self, keep: Collection[str] = ()) -> Found | None:
        """The prefix's segment, computed if need be; None when there is no prefix."""
        if not len(self.prefix_ids):
            return None
        return self._find(self._prefix_key, self.prefix_ids[:0], self.prefix_ids, keep)

    def find(
        self,
        document: str,
        keep: Collection[str] = (),
        progress: Callable[[], None] | None = None,
        *,
        hidden_layer: int | None = None,
        need: DocumentNeed | None = None,
    ) -> Found:
        """A document's segment, loaded or computed if need be; those in `keep` are not evicted.

        Of a segment in a tier only what the request has `need` of is read (None: all of it).

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
        return self._find(key, self._context_ids, token_ids, keep, progress, hidden_layer, need)

    def prefetch(
        self,
        document: str,
        *,
        hidden_layer: int | None = None,
        need: DocumentNeed | None = None,
    ) -> None:
        """Begin to read on a thread what `find` would load for the same arguments."""
        token_ids = self.token_ids(document)
        if self.tiers.store and not self.is_cached(document):
            hidden_layer = self._choose_layer(document, hidden_layer)
            key = self._keys[document][hidden_layer]
            outline = Outline(key, len(token_ids), len(self._context_ids), hidden_layer)
            self.tiers.prefetch(outline, None if need is None else need.now)

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

    def _find(
        self,
        key: str,
        context_ids: np.ndarray,
        token_ids: np.ndarray,
        keep: Collection[str],
        progress: Callable[[], None] | None = None,
        hidden_layer: int | None = None,
        need: DocumentNeed | None = None,
    ) -> Found:
        parts, keep = self.tiers.parts, {*keep, key, self._prefix_key}
        used = parts.used(len(token_ids), None if need is None else need.all)
        segment = self.store.get(key, used)
        if segment is not None:
            where = self.tiers.complete(segment, need, partial(self._hold, keep=keep))
            if where == "":
                return Found(segment, "cached", f"found in memory ({segment.origin})")
            if where is not None:
                return Found(segment, "loaded", f"found in memory in part, {where}")
            self._discard(segment)
        evicted = self.store.was_evicted(key)
        outline = Outline(key, len(token_ids), len(context_ids), hidden_layer)
        loaded = self.tiers.load(outline, need, partial(self._take_pages, keep=keep))
        if not isinstance(loaded, Missed):
            self.store.put(loaded[0], used)
            return Found(loaded[0], "loaded", loaded[1])
        context = self._context(context_ids, keep)
        segment = self._compute(key, context, context_ids, token_ids, keep, progress, hidden_layer)
        origin = f"computed in {segment.offline_seconds:.2f} s"
        origin += f"; {loaded.reason}" if loaded.reason else ""
        segment = replace(segment, origin=origin)
        self.store.put(segment, parts.used(len(token_ids), None), used)
        self.tiers.save(segment)
        reason = "evicted to make room, computed anew" if evicted else "first use, computed now"
        if loaded.reason:
            reason += f" ({loaded.reason})"
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
        handle = self._take_pages(len(token_ids), len(context_ids), None, keep)
        try:
            hidden, flops = self._offline.encode(
                handle,
                token_ids,
                len(context_ids),
                context=context,
                hidden_layer=hidden_layer,
                progress=progress,
            )
        except BaseException:
            self._runner.pool.allocator.release_segment(handle)
            raise
        seconds = time.perf_counter() - started
        self.tiers.computed(flops, seconds)
        return Segment(
            key=key,
            handle=handle,
            first_position=len(context_ids),
            num_tokens=len(token_ids),
            offline_flops=flops,
            offline_seconds=seconds,
            hidden=hidden,
            hidden_layer=hidden_layer,
        )

    def _discard(self, segment: Segment) -> None:
        self.store.discard(segment.key)
        self.tiers.forget(segment)

    # --- room ------------------------------------------------------------------------------------

    def _take_pages(
        self,
        num_tokens: int,
        first_position: int,
        present: NDArray[np.bool_] | None,
        keep: Collection[str],
    ) -> int:
        """Pages for a new segment, others evicted for it; BudgetError where that is no help."""
        while True:
            try:
                return self._runner.pool.create_segment(num_tokens, first_position, present)
            except OutOfPages as missing:
                self.make_room(keep, missing, f"a document of {num_tokens} tokens")

    def _hold(self, segment: Segment, pages: NDArray[np.bool_], keep: Collection[str] = ()) -> None:
        """Places for pages of a segment; BudgetError where there is no room."""
        while True:
            try:
                return self.tiers.parts.hold(segment.handle, pages)
            except OutOfPages as missing:
                self.make_room(keep, missing, f"a document of {segment.num_tokens} tokens")

    def _context(self, context_ids: np.ndarray, keep: Collection[str]) -> Segment | None:
        """What documents are computed behind."""
        if not len(context_ids):
            return None
        return self._find(self._prefix_key, context_ids[:0], context_ids, keep).segment

    def make_room(self, keep: Collection[str], missing: OutOfPages, what: str) -> None:
        """Evict regions of segments that the request does not need, or raise BudgetError."""
        allocator, found = self._runner.pool.allocator, False
        # What the request had taken before it fell short is free again.
        wanted = allocator.free_pages() + missing.pages_needed - missing.pages_free
        while allocator.free_pages() < wanted:
            evicted = self.store.evict_region(keep, self._drop_region)
            if evicted is None:
                break
            found = True
            if evicted[1]:
                self.tiers.forget(evicted[0])
        if found:
            return
        stats = self._runner.pool.allocator.stats()
        short = missing.pages_needed - missing.pages_free
        wanted = (stats["num_pages"] + short) * stats["bytes_per_page"]
        raise BudgetError(
            f"{what} needs {missing.pages_needed} pages, but only {missing.pages_free} of "
            f"{stats['num_pages']} are free and nothing can be evicted; "
            f"raise kv_budget to at least {wanted:,} bytes"
        ) from missing

    def _drop_region(self, segment: Segment, region: int, unused: bool) -> bool:
        """Let a region of a segment go, if a tier has it or nobody seems to need it."""
        if not self.tiers.can_come_back(segment) and not unused:
            return False
        self.tiers.parts.drop(segment, region)
        return True

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
        if self.tiers.complete(old, None, partial(self._hold, keep={*keep, old_key})) is None:
            self._discard(old)
            return None
        started = time.perf_counter()
        hidden, flops = self._offline.encode(
            old.handle,
            token_ids,
            old.first_position,
            context=self._context(self._context_ids, keep),
            hidden_layer=hidden_layer,
            writes=False,
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
