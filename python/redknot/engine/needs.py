"""What a request reads of its cached documents, so that a tier need not give more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from redknot.engine.runner import HeadRules
from redknot.recovery import PromptLayout, RecoveryPlan
from redknot.store.layout import NeededTokens

__all__ = ["needed_tokens", "rows_are_known"]


def rows_are_known(plan: RecoveryPlan) -> bool:
    """Whether the very rows that are refreshed attend, in every layer, and none is chosen later."""
    return all(step.pick is None and np.array_equal(step.live, step.fresh) for step in plan.layers)


def needed_tokens(plan: RecoveryPlan, layout: PromptLayout, rules: HeadRules) -> list[NeededTokens]:
    """Tokens of each document whose cached K/V some row of the plan, or of the answer, sees.

    A head needs what is visible to the rows that attend in its layer (live ones and the query's;
    rows of the answer see no more of the documents than the query's last row), less what the plan
    replaces before anything reads it. For plans of which `rows_are_known`.
    """
    masks: list[NDArray[np.bool_]] = []
    known: dict[tuple[object, ...], int] = {}
    num_heads = rules.windows.shape[-1]
    group = np.empty((len(plan.layers), num_heads), dtype=np.int64)
    for layer, step in enumerate(plan.layers):
        for head in range(num_heads):
            window, sink = int(rules.windows[layer, head]), int(rules.sinks[layer, head])
            replaced = step.fresh if rules.is_global[layer, head] else step.fresh_local
            key = (window, sink, id(step.live), id(replaced))
            if key not in known:
                known[key] = len(masks)
                mask = _visible(layout, step.live, window, sink)
                mask[replaced] = False
                masks.append(mask)
            group[layer, head] = known[key]
    tokens = np.stack(masks)
    return [NeededTokens(tokens[:, d.begin : d.end], group) for d in layout.documents]


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
