"""Policies of the recovery engine, and the ledger that says what they cost."""

import importlib
import pkgutil

from redknot.recovery.cacheblend import CacheBlend
from redknot.recovery.dense import Dense
from redknot.recovery.duo_attention import DuoAttention
from redknot.recovery.epic import Epic
from redknot.recovery.ledger import FlopCounter, Ledger, ModelShape, dense_prefill_flops
from redknot.recovery.live_span import LiveSpan
from redknot.recovery.naive import Naive
from redknot.recovery.plan import (
    FfnRule,
    LayerPlan,
    LookAhead,
    Pick,
    Placement,
    PromptLayout,
    RecoveryPlan,
    Signal,
)
from redknot.recovery.policy import Policy
from redknot.recovery.random_rows import RandomRows
from redknot.recovery.redknot import RedKnot

__all__ = [
    "POLICIES",
    "CacheBlend",
    "Dense",
    "DuoAttention",
    "Epic",
    "FfnRule",
    "FlopCounter",
    "LayerPlan",
    "Ledger",
    "LiveSpan",
    "LookAhead",
    "ModelShape",
    "Naive",
    "Pick",
    "Placement",
    "Policy",
    "PromptLayout",
    "RandomRows",
    "RecoveryPlan",
    "RedKnot",
    "Signal",
    "dense_prefill_flops",
]


def _policies() -> dict[str, type[Policy]]:
    """Every policy in this folder by its name, so that a new one is a new file and no more."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Policy) and value is not Policy
        ]
    return {policy.name: policy for policy in sorted(found, key=lambda policy: policy.name)}


POLICIES: dict[str, type[Policy]] = _policies()
