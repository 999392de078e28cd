"""DuoAttention: every token is computed, but only global heads see and keep the whole context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from redknot.heads import HeadMap
from redknot.recovery.plan import NOTHING, LayerPlan, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy

__all__ = ["DuoAttention"]


@dataclass(frozen=True)
class DuoAttention(Policy):
    """Sink + window for local heads, nothing reused (after arXiv 2410.10819).

    What it lacks against RedKnot is the reuse, and against dense the far keys of local heads.
    """

    name: ClassVar[str] = "duoattention"
    reuses_documents: ClassVar[bool] = False

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """No document row is recovered: all tokens are rows of the query already."""
        return RecoveryPlan((LayerPlan(NOTHING, NOTHING, NOTHING),) * heads.num_layers)
