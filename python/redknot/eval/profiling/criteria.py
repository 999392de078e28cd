"""How many heads a criterion makes global; see `HeadProfile.classify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from redknot.errors import HeadMapError
from redknot.eval.cost import published_prefill_flops

if TYPE_CHECKING:
    from redknot.eval.profiling.head_profile import HeadProfile

__all__ = ["by_budget", "by_rungs", "worthwhile"]


def worthwhile(
    profile: HeadProfile, signal: str | None, min_kl: float | None, layer_floor: int
) -> int:
    """How many heads of the ranking may become global."""
    score = profile.score(signal)
    if profile.kl is None or signal not in (None, "kl"):
        return score.size
    least = profile.min_kl if min_kl is None else min_kl
    worth = score.ravel()[profile.ranking(signal, layer_floor)] >= least
    return max(int(np.flatnonzero(worth).max(initial=-1)) + 1, layer_floor * score.shape[0])


def by_rungs(
    profile: HeadProfile,
    name: str,
    limit: float,
    signal: str | None,
    coverage: float | None,
    layer_floor: int,
) -> int:
    """Fewest global heads with which a whole map that was run kept within a loss."""
    asked_otherwise = signal not in (None, "kl") or layer_floor or coverage is not None
    if not profile.rungs or asked_otherwise:
        why = "with another signal, coverage or layer_floor" if asked_otherwise else "at all"
        raise HeadMapError(
            f"{name} needs whole maps that were run, and none was {why}; profile again with "
            "that, or choose another criterion"
        )
    dense = profile.rungs[-1]
    for rung in profile.rungs:
        loss = rung.kl if name == "max_kl" else 100 * (dense.accuracy - rung.accuracy)
        if loss <= limit:
            return rung.num_global
    return dense.num_global


def by_budget(
    profile: HeadProfile,
    name: str,
    limit: float,
    most: int,
    context: int | None,
    options: dict[str, Any],
) -> int:
    """As many global heads as a share or a budget allows, `most` at the most."""
    facts = profile.model
    size = facts.shape.num_layers * facts.shape.num_kv_heads
    if name == "global_fraction":
        return min(most, int(limit * size + 1e-9))
    tokens = context or int(profile.calibration["context_tokens"])

    def cost(num_global: int) -> float:
        heads = profile.head_map(num_global, **options)
        if name == "kv_bytes":
            return heads.kv_bytes(
                tokens,
                head_dim=facts.shape.head_dim,
                bytes_per_element=facts.bytes_per_element,
                sliding_windows=facts.sliding_windows,
            )
        parts = published_prefill_flops(
            heads, facts.shape, tokens, min(64, tokens), sliding_windows=facts.sliding_windows
        )
        return sum(parts.values())

    if cost(0) > limit:
        raise HeadMapError(
            f"{name} of {limit:,.0f} is too little: all heads local already cost "
            f"{cost(0):,.0f} at {tokens:,} tokens"
        )
    low, high = 0, most  # more global heads never cost less
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
    return low
