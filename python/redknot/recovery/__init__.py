"""Policies of the recovery engine, and the ledger that says what they cost."""

from redknot.recovery.dense import Dense
from redknot.recovery.ledger import FlopCounter, Ledger, ModelShape, dense_prefill_flops
from redknot.recovery.naive import Naive
from redknot.recovery.plan import FfnRule, LayerPlan, Placement, PromptLayout, RecoveryPlan
from redknot.recovery.policy import Policy
from redknot.recovery.redknot import RedKnot

__all__ = [
    "Dense",
    "FfnRule",
    "FlopCounter",
    "LayerPlan",
    "Ledger",
    "ModelShape",
    "Naive",
    "Placement",
    "Policy",
    "PromptLayout",
    "RecoveryPlan",
    "RedKnot",
    "dense_prefill_flops",
]
