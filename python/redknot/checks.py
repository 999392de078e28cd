"""Checks of options, in the caller's words; `name` is the option as the caller wrote it."""

from __future__ import annotations

import math
from typing import TypeGuard

from redknot.errors import InputError

__all__ = ["check_count", "check_number", "check_share"]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no int of at least `least`; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be an int of at least {least}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number >= 0."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise InputError(f"{name} must be a number >= 0, got {value!r}")


def check_share(name: str, value: object, *, zero: bool = False) -> None:
    """Refuse what is no number in (0, 1], or in [0, 1] with `zero`."""
    inside = _is_number(value) and 0 <= value <= 1 and (zero or value != 0)
    if not inside:
        raise InputError(f"{name} must be in {'[' if zero else '('}0, 1], got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
