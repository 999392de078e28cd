"""EPIC: the first tokens of every document are computed anew, everything else is reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from redknot.heads import HeadMap
from redknot.recovery.options import check_counts
from redknot.recovery.plan import LayerPlan, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy

__all__ = ["Epic"]


@dataclass(frozen=True)
class Epic(Policy):
    """LegoLink of EPIC (arXiv 2410.15332): repairs the false attention sinks of reused documents.

    All heads see everything, and all heads' K/V of the recomputed rows are replaced.

    Parameters
    ----------
    first_rows : int
        Rows of each moved document that live in every layer.
    """

    first_rows: int = 16

    name: ClassVar[str] = "epic"

    def __post_init__(self) -> None:
        check_counts(self, "first_rows")

    def effective_heads(self, heads: HeadMap) -> HeadMap:
        """All heads global."""
        return HeadMap.all_global(heads.num_layers, heads.num_kv_heads)

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """First rows of each moved document live in all layers."""
        live = layout.boundary_positions(self.first_rows)
        return RecoveryPlan(
            (LayerPlan(live, live, live),) * heads.num_layers,
            reason=f"the first {self.first_rows} rows of each moved document",
        )
