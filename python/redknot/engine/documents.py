"""The offline part: documents computed once, found again, and computed anew when evicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from redknot._memory import OutOfPages
from redknot.engine.runner import HeadRules, Prompt, Runner
from redknot.errors import BudgetError, UnknownDocumentError
from redknot.heads import HeadMap
from redknot.recovery import Dense, FlopCounter, Placement, PromptLayout
from redknot.store import MemoryStore, Segment, segment_key

__all__ = ["DocumentCache", "Found"]

_ID_LENGTH = 16  # hex digits of the key that name a document to the user


@dataclass(frozen=True)
class Found:
    """A segment, and whether (and why) it had to be computed for this request."""

    segment: Segment
    computed: bool
    reason: str


class DocumentCache:
    """Documents of one engine: token ids by id, their segments in the store.

    Parameters
    ----------
    runner : Runner
        Computes what is missing.
    store : MemoryStore
        Holds the segments.
    fingerprint : str
        Of the model.
    prefix_ids : np.ndarray
        The prompt's prefix; may be empty.
    behind_prefix : bool
        Whether documents are computed behind the prefix, or alone from position 0.
    """

    def __init__(
        self,
        runner: Runner,
        store: MemoryStore,
        *,
        fingerprint: str,
        prefix_ids: np.ndarray,
        behind_prefix: bool,
    ) -> None:
        self._runner = runner
        self.store = store
        self._fingerprint = fingerprint
        self.prefix_ids = prefix_ids
        self._context_ids = prefix_ids if behind_prefix else prefix_ids[:0]
        self._token_ids: dict[str, np.ndarray] = {}
        self._keys: dict[str, str] = {}

    # --- documents by id -------------------------------------------------------------------------

    def register(self, token_ids: np.ndarray) -> str:
        """Remember a document and return its id; the same tokens have the same id."""
        key = self._segment_key(self._context_ids, token_ids)
        document = key[:_ID_LENGTH]
        self._token_ids[document] = token_ids
        self._keys[document] = key
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
        return self._keys[document] in self.store

    def keys(self, documents: Collection[str]) -> set[str]:
        """Keys that a request over `documents` must keep: theirs and the prefix's."""
        return {self._keys[document] for document in documents} | {self._prefix_key()}

    def clear(self) -> None:
        """Forget every document and drop every segment, the prefix's included."""
        self.store.clear()
        self._token_ids.clear()
        self._keys.clear()

    # --- segments --------------------------------------------------------------------------------

    def prefix(self, keep: Collection[str] = ()) -> Found | None:
        """The prefix's segment, computed if need be; None when there is no prefix."""
        if not len(self.prefix_ids):
            return None
        return self._find(self._prefix_key(), self.prefix_ids[:0], self.prefix_ids, keep, None)

    def find(
        self,
        document: str,
        keep: Collection[str] = (),
        progress: Callable[[], None] | None = None,
    ) -> Found:
        """A document's segment, computed if need be; segments in `keep` are not evicted for it.

        Raises
        ------
        BudgetError
            When the pool cannot hold it; nothing was changed.
        """
        token_ids = self.token_ids(document)
        return self._find(self._keys[document], self._context_ids, token_ids, keep, progress)

    def _prefix_key(self) -> str:
        return self._segment_key(self.prefix_ids[:0], self.prefix_ids)

    def _segment_key(self, context_ids: np.ndarray, token_ids: np.ndarray) -> str:
        decoder = self._runner.decoder
        return segment_key(
            fingerprint=self._fingerprint,
            dtype=decoder.dtype,
            inv_freq=decoder.inv_freq.cpu().numpy(),
            prefix_ids=context_ids,
            token_ids=token_ids,
        )

    def _find(
        self,
        key: str,
        context_ids: np.ndarray,
        token_ids: np.ndarray,
        keep: Collection[str],
        progress: Callable[[], None] | None,
    ) -> Found:
        segment = self.store.get(key)
        if segment is not None:
            return Found(segment, computed=False, reason="found in memory")
        evicted = self.store.was_evicted(key)
        context = (
            self._find(self._prefix_key(), context_ids[:0], context_ids, keep, None).segment
            if len(context_ids)
            else None
        )
        segment = self._compute(
            key, context, context_ids, token_ids, {*keep, self._prefix_key()}, progress
        )
        self.store.put(segment)
        reason = "evicted to make room, computed anew" if evicted else "first use, computed now"
        return Found(segment, computed=True, reason=reason)

    def make_room(self, keep: Collection[str], missing: OutOfPages, what: str) -> None:
        """Evict one segment that the request does not need, or raise BudgetError."""
        if self.store.evict_one(keep) is not None:
            return
        stats = self._runner.pool.allocator.stats()
        short = missing.pages_needed - missing.pages_free
        wanted = (stats["num_pages"] + short) * stats["bytes_per_page"]
        raise BudgetError(
            f"{what} needs {missing.pages_needed} pages, but only {missing.pages_free} of "
            f"{stats['num_pages']} are free and nothing can be evicted; "
            f"raise kv_budget to at least {wanted:,} bytes"
        ) from missing

    def _compute(
        self,
        key: str,
        context: Segment | None,
        context_ids: np.ndarray,
        token_ids: np.ndarray,
        keep: Collection[str],
        progress: Callable[[], None] | None,
    ) -> Segment:
        """Dense prefill of a segment behind its context; K and V go straight to its pages."""
        started = time.perf_counter()
        decoder, allocator = self._runner.decoder, self._runner.pool.allocator
        first, total = len(context_ids), len(context_ids) + len(token_ids)
        while True:
            try:
                handle = allocator.create_segment(len(token_ids), first)
                break
            except OutOfPages as missing:
                self.make_room(keep, missing, f"a document of {len(token_ids)} tokens")
        counter = FlopCounter(decoder.shape)
        rules = _dense_rules(decoder.native_windows())
        session = allocator.create_session(rules.windows, rules.sinks)
        try:
            if context is not None:
                allocator.append_segment(session, context.handle)
            allocator.append_segment(session, handle)
            layout = PromptLayout(
                prefix_end=first, documents=(), query_begin=first, num_tokens=total
            )
            heads = HeadMap.all_global(decoder.shape.num_layers, decoder.shape.num_kv_heads)
            self._runner.prefill(
                session,
                Prompt(
                    np.concatenate([context_ids, token_ids]), layout, Dense().plan(layout, heads)
                ),
                rules,
                tail_slots=lambda layer: allocator.segment_slots(handle, layer),
                counter=counter,
                want_logits=False,
                progress=progress,
            )
        except BaseException:
            allocator.release_segment(handle)
            raise
        finally:
            allocator.release_session(session)
        return Segment(
            key=key,
            handle=handle,
            first_position=first,
            num_tokens=len(token_ids),
            offline_flops=sum(counter.close().values()),
            offline_seconds=time.perf_counter() - started,
        )


def _dense_rules(windows: np.ndarray) -> HeadRules:
    return HeadRules(np.ones_like(windows, dtype=bool), windows, np.zeros_like(windows))


def place(prefix_end: int, segments: list[Segment]) -> tuple[Placement, ...]:
    """Documents one behind the other behind the prefix; the first may be at home, so exact."""
    placements, begin = [], prefix_end
    for number, segment in enumerate(segments):
        end = begin + segment.num_tokens
        offset = begin - segment.first_position
        placements.append(Placement(begin, end, offset, exact=number == 0 and offset == 0))
        begin = end
    return tuple(placements)
