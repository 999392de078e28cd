"""Checks of policies' options, in the caller's words."""

from __future__ import annotations

from redknot.checks import check_count, check_share
from redknot.errors import InputError
from redknot.recovery.plan import SIGNALS
from redknot.recovery.policy import Policy

__all__ = ["check_counts", "check_shares", "check_signals"]


def check_shares(policy: Policy, *options: str, zero: bool = False) -> None:
    """Refuse a share outside (0, 1], or [0, 1] with `zero`; None passes."""
    for option in options:
        value = getattr(policy, option)
        if value is not None:
            check_share(f"{type(policy).__name__}: {option}", value, zero=zero)


def check_counts(policy: Policy, *options: str) -> None:
    """Refuse what is not an int >= 0; None passes."""
    for option in options:
        value = getattr(policy, option)
        if value is not None:
            check_count(f"{type(policy).__name__}: {option}", value, least=0)


def check_signals(policy: Policy, *options: str) -> None:
    """Refuse a signal that does not exist."""
    for option in options:
        value = getattr(policy, option)
        if value not in SIGNALS:
            raise InputError(
                f"{type(policy).__name__}: {option} must be one of {', '.join(SIGNALS)}, "
                f"got {value!r}"
            )
