"""Naive reuse: cached K/V are taken as they are; only the query is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redknot.heads import HeadMap
from redknot.recovery.plan import LayerPlan, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy

__all__ = ["Naive"]


@dataclass(frozen=True)
class Naive(Policy):
    """Reuse every document's K/V verbatim in all heads; no row of a document lives.

    Heads see what the head map lets them see, as under every other policy, so that it differs from
    RedKnot in the recovery alone.
    """

    name: ClassVar[str] = "naive"

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """Nothing is live but the query."""
        nothing = np.empty(0, dtype=np.int64)
        return RecoveryPlan((LayerPlan(nothing, nothing),) * heads.num_layers)
