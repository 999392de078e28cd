"""What every policy is: a small frozen dataclass that turns a prompt's layout into a plan."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from redknot.heads import HeadMap
from redknot.recovery.plan import PromptLayout, RecoveryPlan

__all__ = ["Policy"]


@runtime_checkable
class Policy(Protocol):
    """A choice of (live rows, which K/V are refreshed, where the FFN runs)."""

    name: ClassVar[str]
    # False: documents are not read from the cache at all; every token is a row of the query.
    reuses_documents: ClassVar[bool]

    def effective_heads(self, heads: HeadMap) -> HeadMap:
        """Return the head map this policy runs under."""
        ...

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """Decide, before anything is computed, what each layer does with `layout`."""
        ...
