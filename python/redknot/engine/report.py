"""From a plan to words: what happened to each document of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from redknot.engine.documents import Found
from redknot.engine.results import DocumentReport, Explanation
from redknot.engine.runner import HeadRules
from redknot.recovery import Placement, PromptLayout, RecoveryPlan

__all__ = ["explain", "explain_shared"]


def explain(
    policy: str,
    documents: Sequence[str],
    part_lengths: Sequence[int],
    found: Sequence[Found],
    layout: PromptLayout,
    plan: RecoveryPlan,
    rules: HeadRules,
    *,
    kv_pages: int,
    private_kv_pages: int,
    page_bytes: int,
) -> Explanation:
    """Explain one prefill.

    `part_lengths` are the tokens of the prefix and of each document; `found` is empty where the
    policy does not read the cache.
    """
    num_heads = rules.is_global.size
    ends = np.cumsum(part_lengths)
    reports = []
    for number, document in enumerate(documents):
        begin, end = int(ends[number]), int(ends[number + 1])
        if found:
            item, placement = found[number], layout.documents[number]
            refreshed, rows = _refreshed(plan, rules.is_global, begin, end)
            report = DocumentReport(
                id=document,
                begin=begin,
                end=end,
                source=item.source,
                reason=f"{item.reason}; {_where(placement)}",
                moved_by=placement.offset,
                heads_reused=num_heads - refreshed,
                heads_refreshed=refreshed,
                rows_recomputed=rows,
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


def _refreshed(plan: RecoveryPlan, is_global: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """(layer, head) pairs refreshed somewhere in [begin, end), and the most rows live in it."""
    heads = rows = 0
    for layer, step in enumerate(plan.layers):
        live = np.diff(np.searchsorted(step.live, (begin, end)))[0]
        fresh = np.diff(np.searchsorted(step.fresh_local, (begin, end)))[0]
        rows = max(rows, int(live))
        num_global = int(is_global[layer].sum())
        heads += num_global * (live > 0) + (is_global.shape[1] - num_global) * (fresh > 0)
    return int(heads), rows
