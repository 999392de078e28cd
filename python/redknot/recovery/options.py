"""Checks of policies' options, in the caller's words."""

from __future__ import annotations

from redknot.errors import InputError
from redknot.recovery.plan import SIGNALS
from redknot.recovery.policy import Policy

__all__ = ["check_counts", "check_shares", "check_signals"]


def check_shares(policy: Policy, *options: str, zero: bool = False) -> None:
    """Refuse a share outside (0, 1], or [0, 1] with `zero`; None passes."""
    for option in options:
        value = getattr(policy, option)
        if value is not None and not (0.0 < value <= 1.0 or (zero and value == 0.0)):
            raise InputError(
                f"{type(policy).__name__}: {option} must be in {'[' if zero else '('}0, 1], "
                f"got {value}"
            )


def check_counts(policy: Policy, *options: str) -> None:
    """Refuse what is not an int >= 0; None passes."""
    for option in options:
        value = getattr(policy, option)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise InputError(
                f"{type(policy).__name__}: {option} must be an int >= 0, got {value!r}"
            )


def check_signals(policy: Policy, *options: str) -> None:
    """Refuse a signal that does not exist."""
    for option in options:
        value = getattr(policy, option)
        if value not in SIGNALS:
            raise InputError(
                f"{type(policy).__name__}: {option} must be one of {', '.join(SIGNALS)}, "
                f"got {value!r}"
            )
