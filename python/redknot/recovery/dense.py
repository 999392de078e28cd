"""Dense prefill: every token, every head, nothing reused. The baseline of every saving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from redknot.heads import HeadMap
from redknot.recovery.plan import NOTHING, LayerPlan, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Policy):
    """Compute every token in every layer; all heads global, before and while decoding."""

    name: ClassVar[str] = "dense"
    reuses_documents: ClassVar[bool] = False

    def effective_heads(self, heads: HeadMap) -> HeadMap:
        """All heads global."""
        return HeadMap.all_global(heads.num_layers, heads.num_kv_heads)

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """No document row is recovered: all tokens are rows of the query already."""
        return RecoveryPlan((LayerPlan(NOTHING, NOTHING, NOTHING),) * heads.num_layers)
