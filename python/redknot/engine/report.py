"""From a plan to words: what happened to each document of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from redknot.engine.found import Found
from redknot.engine.results import DocumentReport, Explanation, LiveRange
from redknot.engine.runner import HeadRules, LayerTrace
from redknot.recovery import Placement, PromptLayout

__all__ = ["explain", "explain_shared"]


_SETS = ("live", "fresh", "fresh_local")


class _HostTrace(NamedTuple):
    """A layer's trace on the host."""

    live: np.ndarray
    fresh: np.ndarray
    fresh_local: np.ndarray


def explain(
    policy: str,
    documents: Sequence[str],
    part_lengths: Sequence[int],
    found: Sequence[Found],
    layout: PromptLayout,
    why: str,
    trace: Sequence[LayerTrace],
    rules: HeadRules,
    *,
    kv_pages: int,
    private_kv_pages: int,
    page_bytes: int,
) -> Explanation:
    """Explain one prefill.

    `part_lengths` are the tokens of the prefix and of each document; `found` is empty where the
    policy does not read the cache. `why` is the plan's reason for the rows that lived, which
    `trace` lists.
    """
    num_layers, num_heads = rules.is_global.shape[0], rules.is_global.size
    rows = [_HostTrace(*(getattr(step, n).cpu().numpy() for n in _SETS)) for step in trace]
    ends = np.cumsum(part_lengths)
    reports = []
    for number, document in enumerate(documents):
        begin, end = int(ends[number]), int(ends[number + 1])
        if found:
            item, placement = found[number], layout.documents[number]
            refreshed = _refreshed(rows, rules.is_global, begin, end)
            live = _live_ranges([_inside(step.live, begin, end) for step in rows])
            report = DocumentReport(
                id=document,
                begin=begin,
                end=end,
                source=item.source,
                reason=f"{item.reason}; {_where(placement)}",
                moved_by=placement.offset,
                heads_reused=num_heads - refreshed,
                heads_refreshed=refreshed,
                rows_recomputed=max((item.num_rows for item in live), default=0),
                live=live,
                why=why if live else "",
            )
        else:
            report = DocumentReport(
                id=document,
                begin=begin,
                end=end,
                source="not used",
                reason=f"policy {policy} computes every token",
                moved_by=0,
                heads_reused=0,
                heads_refreshed=num_heads,
                rows_recomputed=end - begin,
                live=(LiveRange(0, num_layers, end - begin, ((begin, end),)),),
                why="the policy reuses nothing",
            )
        reports.append(report)
    return Explanation(
        policy=policy,
        prefix_tokens=part_lengths[0],
        question_tokens=layout.num_tokens - int(ends[-1]),
        documents=tuple(reports),
        kv_bytes=kv_pages * page_bytes,
        private_kv_bytes=private_kv_pages * page_bytes,
    )


def explain_shared(
    recovered: Explanation,
    *,
    question_tokens: int,
    num_heads: int,
    kv_bytes: int,
    private_kv_bytes: int,
) -> Explanation:
    """Explain a question behind documents that an earlier request, `recovered`, has recovered."""
    reason = "recovered before, in this order and under this policy; its pages are shared"
    return replace(
        recovered,
        question_tokens=question_tokens,
        documents=tuple(
            replace(
                document,
                source="shared",
                reason=reason,
                heads_reused=num_heads,
                heads_refreshed=0,
                rows_recomputed=0,
                live=(),
                why="",
            )
            for document in recovered.documents
        ),
        kv_bytes=kv_bytes,
        private_kv_bytes=private_kv_bytes,
    )


def _where(placement: Placement) -> str:
    if placement.exact:
        return "at home behind the same prefix, so exact"
    if placement.offset:
        return f"moved by {placement.offset} tokens, its keys are rotated while they are read"
    return "at home, but behind other tokens"


def _inside(rows: np.ndarray, begin: int, end: int) -> np.ndarray:
    return rows[slice(*np.searchsorted(rows, (begin, end)))]


def _live_ranges(live: Sequence[np.ndarray]) -> tuple[LiveRange, ...]:
    """Runs of layers in which the same rows live."""
    ranges: list[LiveRange] = []
    before = np.empty(0, dtype=np.int64)
    for layer, rows in enumerate(live):
        if len(rows) and np.array_equal(rows, before):
            ranges[-1] = replace(ranges[-1], end_layer=layer + 1)
        elif len(rows):
            gaps = np.flatnonzero(np.diff(rows) > 1)
            begins, ends = rows[np.r_[0, gaps + 1]], rows[np.r_[gaps, -1]] + 1
            runs = tuple(zip(begins.tolist(), ends.tolist(), strict=True))
            ranges.append(LiveRange(layer, layer + 1, len(rows), runs))
        before = rows
    return tuple(ranges)


def _refreshed(rows: Sequence[_HostTrace], is_global: np.ndarray, begin: int, end: int) -> int:
    """(layer, head) pairs of which some K/V in [begin, end) were replaced."""
    heads = 0
    for step, classes in zip(rows, is_global, strict=True):
        num_global = int(classes.sum())
        heads += num_global * bool(len(_inside(step.fresh, begin, end)))
        heads += (len(classes) - num_global) * bool(len(_inside(step.fresh_local, begin, end)))
    return heads
