"""Ours: few rows, live between the first and the last global head, chosen by what these bring."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.recovery.options import check_counts, check_shares, check_signals
from redknot.recovery.plan import (
    FfnRule,
    LookAhead,
    Pick,
    PromptLayout,
    RecoveryPlan,
    Signal,
)
from redknot.recovery.policy import Policy
from redknot.recovery.span import (
    SpanRows,
    probed_heads,
    span_begin,
    span_entry_layer,
    span_plan,
    span_start,
)

__all__ = ["LiveSpan"]


@dataclass(frozen=True)
class LiveSpan(Policy):
    """Rows live only where they can matter, and only those that something reached.

    With the cached K/V of local heads taken as right, a row of a moved document differs from its
    offline self only through global heads. So the global heads of the first layer that matters are
    asked, given the hidden states that the offline pass stored there, which rows they change most:
    these are kept, and the rows from which these read most. All others are dropped at once and keep
    their cached K/V. The kept ones live until the last layer with a global head has their K and V.
    They enter there with the stored hidden states; where weaker global heads come before, which
    these states lack, they are computed from the embeddings on, and so are the few rows that the
    heads of layer 0 change most.

    Parameters
    ----------
    row_fraction : float
        Share of the moved documents' rows that are kept, in [0, 1], edge, early and read rows not
        counted.
    read_fraction : float
        Share of the rows that are kept besides, in [0, 1]: those to which these heads give most
        weight in the kept rows.
    early_fraction : float
        Share of the rows that are kept besides, in [0, 1], because the global heads of layer 0
        bring most into them. Nothing unless it has some and the rows are picked by a later layer.
    min_rows : int
        The least number of rows that are kept.
    signal : {"foreign", "attention_norm"}
        Which rows are kept: those with the largest part of the global heads' output that comes
        from other segments, or with the largest output. `RandomRows` is the control.
    refresh_local : bool
        Whether K/V of live rows replace the cached ones in local heads too, so that other live rows
        see what global heads of earlier layers brought. Costs private copies of the documents'
        pages in the span during the prefill; local heads give up what lies outside sink + window
        right behind it.
    ffn_mass : float
        From `dense_until` on, the FFN runs for the smallest set of live rows that holds this share
        of the importance. 1: every live row.
    ffn_signal : {"foreign", "attention_norm", "random"}
        The importance.
    dense_until : int
        Layers below it run the FFN for every live row.
    edge_rows : int
        First rows of each moved document that live from the first layer on: local heads there let
        them see the end of the document before.
    boundary_rows : int
        First rows of each moved document that live in every layer, with K/V replaced in all heads.
    first_layer : int, optional
        Whose global heads pick the rows; default: the first layer with a global head that has at
        least a tenth of the largest sensitivity, where the head map tells them.
    draw_seed : int
        Of the random signal.
    """

    row_fraction: float = 0.05
    read_fraction: float = 0.02
    early_fraction: float = 0.01
    min_rows: int = 1
    signal: Literal["foreign", "attention_norm"] = "foreign"
    refresh_local: bool = True
    ffn_mass: float = 1.0
    ffn_signal: Signal = "foreign"
    dense_until: int = 0
    edge_rows: int = 3
    boundary_rows: int = 0
    first_layer: int | None = None
    draw_seed: int = 0

    name: ClassVar[str] = "live_span"

    def __post_init__(self) -> None:
        check_shares(self, "row_fraction", "read_fraction", "early_fraction", zero=True)
        check_shares(self, "ffn_mass")
        check_counts(self, "min_rows", "dense_until", "edge_rows", "boundary_rows", "first_layer")
        check_counts(self, "draw_seed")
        check_signals(self, "ffn_signal")
        if self.signal not in ("foreign", "attention_norm"):
            raise InputError(
                f"LiveSpan: signal must be foreign or attention_norm, got {self.signal!r}"
            )

    def entry_layer(self, heads: HeadMap) -> int | None:
        """The layer that picks, unless it needs no stored hidden states."""
        begin = span_begin(heads, self.first_layer)
        return span_entry_layer(heads, begin) if self.row_fraction or self.min_rows else None

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """Rows up to the last global head, picked by those of the first layer that matters."""
        rows = SpanRows.of(layout, self.boundary_rows, self.edge_rows)
        begin = span_begin(heads, self.first_layer)
        start, total = span_start(heads, begin), len(rows.span)
        keep = max(math.ceil(self.row_fraction * total), self.min_rows)
        droppable = total - len(rows.edge) - keep
        pick = early_pick = ahead = None
        if not keep:
            rows = replace(rows, span=rows.edge)
        elif droppable > 0 and begin is not None:
            read = min(math.ceil(self.read_fraction * total), droppable)
            probed = probed_heads(heads, begin)
            pick = Pick(keep, rows.edge, self.signal, probed, read)
            if start != begin:
                ahead = LookAhead(begin, rows.span, pick)
                early = min(math.ceil(self.early_fraction * total), droppable - read)
                if early and heads.whole.is_global[0].any():
                    early_pick = Pick(early, rows.edge, self.signal, probed_heads(heads, 0))
                    rows = replace(rows, span=rows.span.copy())  # a pick's set is its own
        forced = np.concatenate([rows.edge, layout.query_positions])

        def ffn(layer: int) -> FfnRule | None:
            if self.ffn_mass >= 1.0 or layer < self.dense_until:
                return None
            return FfnRule(self.ffn_mass, 1, forced, self.ffn_signal, self.draw_seed + layer)

        layers = span_plan(
            heads,
            start,
            rows,
            pick=early_pick if ahead else pick,
            refresh_local=self.refresh_local,
            ffn=ffn,
        )
        return RecoveryPlan(layers, self._reason(heads, begin, pick, early_pick), ahead)

    def _reason(
        self, heads: HeadMap, begin: int | None, pick: Pick | None, early_pick: Pick | None
    ) -> str:
        which = "every row of a moved document"
        most = {
            "foreign": "into which they bring most from other documents",
            "attention_norm": "with the largest output of these",
        }[self.signal]
        if pick is not None:
            heads_of = "strongest global heads" if pick.heads else "global heads"
            which = f"the {pick.keep} rows of the prompt {most}, by the {heads_of} of layer {begin}"
            if pick.read:
                which += f", and the {pick.read} that these read most"
        if early_pick is not None:
            which += f"; {early_pick.keep} more by those of layer 0"
        return (
            f"the first {self.edge_rows} of the document; {which}; none behind layer "
            f"{heads.whole.last_global_layer}, the last with a global head"
        )
