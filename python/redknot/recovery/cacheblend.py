"""CacheBlend: all rows in the first layers, then those whose K and V moved most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.recovery.options import check_shares
from redknot.recovery.plan import NOTHING, LayerPlan, Pick, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy
from redknot.recovery.span import span_begin

__all__ = ["CacheBlend"]


@dataclass(frozen=True)
class CacheBlend(Policy):
    """Selective recomputation of tokens, the same in all heads (arXiv 2405.16444).

    All heads see everything. Rows are picked by how far their new K and V lie from the cached
    ones in layer `pick_layer`, where all rows' are computed for the last time; all heads' K/V of
    the rows that are kept are replaced in every later layer.

    Parameters
    ----------
    ratio : float
        Share of the moved documents' rows that is kept.
    pick_layer : int or "after_first_global"
        Published: 1. "after_first_global" takes the layer behind the head map's first global head
        that matters (see `LiveSpan.first_layer`), where the K and V first show what it brought.
    """

    ratio: float = 0.15
    pick_layer: int | Literal["after_first_global"] = 1

    name: ClassVar[str] = "cacheblend"

    def __post_init__(self) -> None:
        check_shares(self, "ratio")
        layer = self.pick_layer
        if layer != "after_first_global" and (not isinstance(layer, int) or layer < 0):
            raise InputError(
                f"CacheBlend: pick_layer must be an int >= 0 or 'after_first_global', got {layer!r}"
            )

    def effective_heads(self, heads: HeadMap) -> HeadMap:
        """All heads global."""
        return HeadMap.all_global(heads.num_layers, heads.num_kv_heads)

    def layer_of_pick(self, heads: HeadMap) -> int:
        """Layer whose K and V decide; at most the last."""
        layer = self.pick_layer
        if layer == "after_first_global":
            first = span_begin(heads)
            layer = 1 if first is None else first + 1
        return min(layer, heads.num_layers - 1)

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """All rows up to the pick, then what it kept."""
        rows, layer = layout.moved_positions, self.layer_of_pick(heads)
        keep = math.ceil(self.ratio * len(rows))
        step = LayerPlan(rows, rows, rows)
        layers = [step] * heads.num_layers
        if keep < len(rows):
            layers[layer] = LayerPlan(rows, rows, rows, pick=Pick(keep, NOTHING, "kv_shift"))
        return RecoveryPlan(
            tuple(layers),
            reason=f"all rows up to layer {layer}, then the {self.ratio:.0%} whose K and V moved "
            "most there",
        )
