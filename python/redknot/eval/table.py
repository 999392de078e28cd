"""From records to the rows of the report: one per (policy, task, length)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from redknot.eval.candidates import Candidate
from redknot.eval.statistics import cluster_bootstrap, paired_interval, wilson_interval

__all__ = ["Gate", "make_rows", "shared_agreement"]

Record = dict[str, Any]

_PUBLISHED = "redknot"  # the label of the policy to whose KL the others' are compared


@dataclass(frozen=True)
class Gate:
    """When a cell is one that a claim may rest on.

    Attributes
    ----------
    min_questions : int
        Least n.
    min_dense_score : float
        Where dense fails there is nothing to keep.
    max_global_fraction : float
        Of the head map.
    """

    min_questions: int = 1000
    min_dense_score: float = 0.9
    max_global_fraction: float = 0.15


def make_rows(
    records: Sequence[Record],
    candidates: Sequence[Candidate],
    *,
    gate: Gate,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows in the order of groups, tasks, candidates; the first candidate is dense.

    Every candidate of a row answered the same questions. Figures of cost come from the measured
    requests of the whole group.
    """
    found = []
    for group in dict.fromkeys(record["group"] for record in records):
        mine = [r for r in records if r["group"] == group and "too_long" not in r]
        left_out = sum(r["group"] == group and "too_long" in r for r in records)
        tasks = dict.fromkeys(task for record in mine for task in record["questions"])
        own = [c for c in candidates if mine and c.label in mine[0]["answers"]]
        costs = {c.label: _costs(mine, c.label) for c in own}
        for task in tasks:
            dense = _column(mine, own[0].label, task, "score")
            published = None
            if _PUBLISHED in mine[0]["answers"]:
                published = _column(mine, _PUBLISHED, task, "kl")
            for c in own:
                row = _quality(mine, c.label, task, dense, published, seed)
                row |= {
                    "length": mine[0]["length"] or round(fmean(r["prompt_tokens"] for r in mine)),
                    "prompts_left_out": left_out,
                    "control": c.is_control,
                    "global_fraction": c.global_fraction,
                    **_ratios(costs[c.label], costs[own[0].label]),
                }
                reason = _why_no_gate(row, fmean(dense), c, gate)
                row |= {"gated": not reason, "not_gated_because": reason}
                found.append(row)
    return found


def shared_agreement(records: Sequence[Record]) -> dict[str, list[int]]:
    """Per candidate: how many measured requests gave the tokens of the shared run, and of how many.

    They may differ where a policy chooses rows by the query.
    """
    found: dict[str, list[int]] = {}
    for record in records:
        for label, same in record.get("shared_equals_alone", {}).items():
            counts = found.setdefault(label, [0, 0])
            counts[0] += bool(same)
            counts[1] += 1
    return found


def _column(records: Sequence[Record], label: str, task: str, what: str) -> list[Any]:
    return [
        value
        for record in records
        for asked, value in zip(record["questions"], record["answers"][label][what], strict=True)
        if asked == task
    ]


def _quality(
    records: Sequence[Record],
    label: str,
    task: str,
    dense: Sequence[float],
    published: Sequence[float] | None,
    seed: int,
) -> dict[str, Any]:
    scores = _column(records, label, task, "score")
    clusters = [record["number"] for record in records for t in record["questions"] if t == task]
    n = len(scores)
    if set(scores) <= {0.0, 1.0}:
        ci = wilson_interval(int(sum(scores)), n)
    else:
        ci = cluster_bootstrap(scores, clusters, seed=seed)
    agreement = _column(records, label, task, "agreement")
    kl = _column(records, label, task, "kl")
    farther = None if published is None else [a - b for a, b in zip(kl, published, strict=True)]
    return {
        "policy": label,
        "task": task,
        "n": n,
        "num_prompts": len(set(clusters)),
        "score": fmean(scores),
        "ci": list(ci),
        "exact_match": fmean(_column(records, label, task, "exact_match")),
        "delta": fmean(scores) - fmean(dense),
        "delta_ci": list(paired_interval(scores, dense, clusters, seed=seed)),
        "token_agreement": sum(a for a, _ in agreement) / max(sum(b for _, b in agreement), 1),
        "kl": fmean(kl),
        "kl_ci": list(cluster_bootstrap(kl, clusters, seed=seed)),
        "kl_minus_redknot": farther and fmean(farther),
        "kl_minus_redknot_ci": farther and list(cluster_bootstrap(farther, clusters, seed=seed)),
    }


def _costs(records: Sequence[Record], label: str) -> list[dict[str, float]]:
    return [record["costs"][label] for record in records if record["costs"]]


def _ratios(costs: Sequence[dict[str, float]], dense: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Sums, means and medians over the measured requests (None where nothing was measured)."""
    if not costs:
        keys = ("flops_saved", "kv_bytes", "kv_ratio", "ttft_seconds", "ttft_ratio",
                "seconds_per_token", "rows_recomputed", "heads_refreshed", "ffn_rows")  # fmt: skip
        return {"num_measured": 0, **dict.fromkeys(keys)}

    def total(what: str, of: Sequence[dict[str, float]] = costs) -> float:
        return sum(cost[what] for cost in of)

    ttft = median(cost["ttft_seconds"] for cost in costs)
    return {
        "num_measured": len(costs),
        "flops_saved": 1.0 - total("flops") / total("dense_flops"),
        "kv_bytes": round(total("kv_bytes") / len(costs)),
        "kv_ratio": total("kv_bytes", dense) / total("kv_bytes"),
        "ttft_seconds": ttft,
        "ttft_ratio": median(cost["ttft_seconds"] for cost in dense) / ttft,
        "seconds_per_token": median(cost["seconds_per_token"] for cost in costs),
        "rows_recomputed": total("rows_recomputed") / max(total("document_tokens"), 1),
        "heads_refreshed": total("heads_refreshed") / len(costs),
        "ffn_rows": total("ffn_flops") / total("ffn_flops", dense),
    }


def _why_no_gate(
    row: dict[str, Any], dense_score: float, candidate: Candidate, gate: Gate
) -> str | None:
    """Why nothing may be claimed on this row; None where it may."""
    heads = candidate.policy.effective_heads(candidate.engine.heads)
    local = ~heads.is_global
    reach = int((heads.windows[local] + heads.sinks[local]).max()) if local.any() else 0
    if candidate.is_control:
        return "a control"
    if row["n"] < gate.min_questions:
        return f"n is below {gate.min_questions}"
    if dense_score < gate.min_dense_score:
        return f"dense itself scores below {gate.min_dense_score}"
    if candidate.engine.heads.global_fraction > gate.max_global_fraction:
        return f"the head map has more than {gate.max_global_fraction:.0%} global heads"
    if 8 * reach > row["length"]:
        return f"window + sink, {reach} tokens, is more than an eighth of the prompt"
    return None
