"""Naive reuse: cached K/V are taken as they are; only the query is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from redknot.heads import HeadMap
from redknot.recovery.plan import NOTHING, LayerPlan, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy

__all__ = ["Naive"]


@dataclass(frozen=True)
class Naive(Policy):
    """Reuse every document's K/V verbatim in all heads; no row of a document lives.

    Heads see what the head map lets them see, as under RedKnot, so that it differs from it in the
    recovery alone.
    """

    name: ClassVar[str] = "naive"

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """Nothing is live but the query."""
        return RecoveryPlan((LayerPlan(NOTHING, NOTHING, NOTHING),) * heads.num_layers)
