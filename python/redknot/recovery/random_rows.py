"""A control that must fail: as many rows as `LiveSpan` carries, but chosen by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from redknot.heads import HeadMap
from redknot.recovery.options import check_counts, check_shares
from redknot.recovery.plan import PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy
from redknot.recovery.span import SpanRows, span_begin, span_entry_layer, span_plan, span_start

__all__ = ["RandomRows"]


@dataclass(frozen=True)
class RandomRows(Policy):
    """`LiveSpan` with rows drawn from `draw_seed`; the draw depends on the prompt's layout alone.

    Parameters
    ----------
    row_fraction : float
        Share of the moved documents' rows that are drawn, in [0, 1], edge rows not counted.
    edge_rows : int
        As of `LiveSpan`.
    draw_seed : int
    """

    row_fraction: float = 0.05
    edge_rows: int = 3
    draw_seed: int = 0

    name: ClassVar[str] = "random_rows"

    def __post_init__(self) -> None:
        check_shares(self, "row_fraction", zero=True)
        check_counts(self, "edge_rows", "draw_seed")

    def entry_layer(self, heads: HeadMap) -> int | None:
        """First layer of the span, unless no row enters there."""
        begin = span_begin(heads)
        enters = self.row_fraction and span_start(heads, begin)
        return span_entry_layer(heads, begin) if enters else None

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """Rows drawn now, in the layers of `LiveSpan`."""
        rows = SpanRows.of(layout, 0, self.edge_rows)
        others = np.setdiff1d(rows.span, rows.edge, assume_unique=True)
        keep = min(math.ceil(self.row_fraction * len(rows.span)), len(others))
        drawn = np.random.default_rng(self.draw_seed).choice(others, keep, replace=False)
        rows = replace(rows, span=np.union1d(drawn, rows.edge))
        return RecoveryPlan(
            span_plan(heads, span_start(heads, span_begin(heads)), rows),
            reason=f"the first {self.edge_rows} of the document; {keep} rows of the prompt drawn "
            f"by chance; none behind layer {heads.whole.last_global_layer}, the last with a "
            "global head",
        )
