"""What a request reads of its cached documents, so that a tier need not give more.

Most of it is known beforehand. Where rows are chosen only while the prefill runs, what local heads
show to them in the layers from there on is known *after the pick*: which pages it could be is known
before, which ones it is only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redknot.engine.runner import HeadRules
from redknot.recovery import LayerPlan, PromptLayout, RecoveryPlan
from redknot.store.layout import NeededTokens

__all__ = ["DocumentNeed", "needs_of"]

_NOBODY = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class DocumentNeed:
    """What a request reads of one document.

    Attributes
    ----------
    now : NeededTokens
        Before the prefill begins.
    later : NeededTokens, optional
        Besides, at most, after the pick; None without a pick that matters.
    """

    now: NeededTokens
    later: NeededTokens | None = None

    @property
    def all(self) -> NeededTokens:
        """Everything that the request may read."""
        if self.later is None:
            return self.now
        return NeededTokens(self.now.tokens | self.later.tokens, self.now.group)


def needs_of(
    plan: RecoveryPlan,
    layout: PromptLayout,
    rules: HeadRules,
    page_size: int,
    picked: Mapping[int, NDArray[np.int64]] | None = None,
) -> list[DocumentNeed]:
    """Tokens of each document whose cached K/V are read, in whole pages.

    A head needs what is visible to the rows that attend in its layer (live ones and the query's;
    rows of the answer see no more of the documents than the query's last row), and what lies beside
    rows in pages that are copied before they are written, less what is replaced before anything
    reads it. `picked` are the rows that picks have kept so far, by the id of the plan's array that
    they were picked from.
    """
    reading = _Reading(plan, picked or {})
    known: dict[tuple[int, ...], int] = {}
    now: list[NDArray[np.bool_]] = []
    later: list[NDArray[np.bool_]] = []
    num_heads = rules.windows.shape[-1]
    group = np.empty((len(plan.layers), num_heads), dtype=np.int64)
    for layer in range(len(plan.layers)):
        for head in range(num_heads):
            window, sink = int(rules.windows[layer, head]), int(rules.sinks[layer, head])
            what = reading.of(layer, bool(rules.is_global[layer, head]))
            key = (window, sink, *map(id, what.arrays))
            if key not in known:
                known[key] = len(now)
                mask = _visible(layout, what.rows, window, sink)
                mask |= _pages(layout, what.copied, page_size)
                mask[what.replaced] = False
                mask[what.read] = True
                more = np.zeros_like(mask)
                if len(what.rows_later):
                    more = _visible(layout, what.rows_later, window, sink) & ~mask
                    more[what.replaced] = False
                now.append(mask)
                later.append(more)
            group[layer, head] = known[key]
    tokens = [np.stack(now)]
    if any(mask.any() for mask in later):
        tokens.append(np.stack(later))
    return [
        DocumentNeed(
            *(
                NeededTokens(masks[:, document.begin : document.end], group).whole_pages(page_size)
                for masks in tokens
            )
        )
        for document in layout.documents
    ]


@dataclass(frozen=True)
class _HeadReads:
    """Positions that matter for a class of heads in a layer."""

    rows: NDArray[np.int64]  # that attend, as far as that is known
    rows_later: NDArray[np.int64]  # that may attend besides
    replaced: NDArray[np.int64]  # before anything reads them
    read: NDArray[np.int64]  # although they are replaced
    copied: NDArray[np.int64]  # whose pages are copied before they are written

    @property
    def arrays(self) -> Sequence[NDArray[np.int64]]:
        return self.rows, self.rows_later, self.replaced, self.read, self.copied


class _Reading:
    """Which rows read what: sets of the plan, as far as its picks have decided them."""

    def __init__(self, plan: RecoveryPlan, picked: Mapping[int, NDArray[np.int64]]) -> None:
        self._plan, self._picked = plan, picked
        self._open_from: dict[int, int] = {}  # layer of the pick, by the id of the plan's array
        self._always = _NOBODY
        if plan.ahead is not None:
            self._open_from[id(plan.ahead.rows)] = -1
            self._always = plan.ahead.pick.always
        for layer, step in enumerate(plan.layers):
            if step.pick is not None:
                self._open_from[id(step.present)] = layer
                self._always = step.pick.always
        self._known: dict[tuple[int, bool], _HeadReads] = {}

    def of(self, layer: int, is_global: bool) -> _HeadReads:
        """What heads of a class read in a layer."""
        if (layer, is_global) not in self._known:
            self._known[layer, is_global] = self._reads(layer, is_global)
        return self._known[layer, is_global]

    def _is_open(self, rows: NDArray[np.int64], layer: int) -> bool:
        """Whether a set stands, in a layer's attention, for what a pick keeps of it."""
        return layer >= self._open_from.get(id(rows), len(self._plan.layers))

    def _reads(self, layer: int, is_global: bool) -> _HeadReads:
        step: LayerPlan = self._plan.layers[layer]
        written = step.fresh if is_global else step.fresh_local
        # K and V are written before the layer's own pick.
        written_is_open = self._is_open(written, layer - 1)
        replaced = self._picked.get(id(written), _NOBODY) if written_is_open else written
        # Pages that are copied before anything is known have to be whole; copies of what is read
        # after a pick are filled then.
        copied = written if self._plan.picks and not is_global and not written_is_open else _NOBODY
        read = _NOBODY
        if step.pick is not None and step.pick.by == "kv_shift":
            read = written  # the cached ones are compared with the new ones
        rows, rows_later = step.live, _NOBODY
        if self._is_open(step.live, layer):
            if id(step.live) in self._picked:
                rows = self._picked[id(step.live)]
            elif not is_global:
                rows, rows_later = self._always, step.live
        if step.pick is not None and is_global:  # all rows ask the global heads, for the pick
            rows = step.present
        ahead = self._plan.ahead
        if ahead is not None and ahead.layer == layer and is_global:
            rows, read = ahead.rows, ahead.rows
        return _HeadReads(rows, rows_later, replaced, read, copied)


def _pages(layout: PromptLayout, positions: NDArray[np.int64], page_size: int) -> NDArray[np.bool_]:
    """All positions [num_tokens] of documents' pages that hold one of some positions."""
    mask = np.zeros(layout.num_tokens, dtype=bool)
    for document in layout.documents if len(positions) else ():
        low, high = np.searchsorted(positions, (document.begin, document.end))
        for page in np.unique((positions[low:high] - document.begin) // page_size):
            begin = document.begin + int(page) * page_size
            mask[begin : min(begin + page_size, document.end)] = True
    return mask


def _visible(
    layout: PromptLayout, live: NDArray[np.int64], window: int, sink: int
) -> NDArray[np.bool_]:
    """Positions [num_tokens] that the attending rows of a layer see in a head."""
    if window < 0:
        return np.ones(layout.num_tokens, dtype=bool)
    rows = np.concatenate([live, layout.query_positions])
    edges = np.zeros(layout.num_tokens + 1, dtype=np.int64)
    np.add.at(edges, np.maximum(rows - window + 1, 0), 1)
    np.add.at(edges, rows + 1, -1)
    visible = np.cumsum(edges[:-1]) > 0
    visible[:sink] = True
    return visible
