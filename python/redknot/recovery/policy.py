"""What every policy is: a small frozen dataclass that turns a prompt's layout into a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.recovery.plan import PromptLayout, RecoveryPlan

__all__ = ["Policy"]


class Policy(ABC):
    """A choice of (live rows, which K/V are refreshed, where the FFN runs)."""

    name: ClassVar[str]
    # False: documents are not read from the cache at all; every token is a row of the query.
    reuses_documents: ClassVar[bool] = True

    def effective_heads(self, heads: HeadMap) -> HeadMap:
        """Return the head map this policy runs under; by default the one it was given."""
        return heads

    def entry_layer(self, heads: HeadMap) -> int | None:
        """Layer whose input hidden states the policy reads from cached documents; None: none."""
        return None

    @abstractmethod
    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """Decide, before anything is computed, what each layer does with `layout`.

        `heads` is the map as given, not `effective_heads` of it.
        """

    @staticmethod
    def checked(policy: Policy) -> Policy:
        """Return `policy`; InputError for anything else, such as a policy's name or class."""
        if not isinstance(policy, Policy):
            raise InputError(f"policy must be one such as redknot.RedKnot(), got {policy!r}")
        return policy
