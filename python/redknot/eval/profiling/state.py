"""What has been measured so far: sums that survive an interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from redknot.errors import InputError
from redknot.eval.profiling.files import write_atomically

__all__ = ["ProfileState", "group_key"]

_FORMAT = 1
_SECONDS_BETWEEN_WRITES = 5.0


def group_key(layer: int, heads: tuple[int, ...]) -> str:
    """Name of a group of KV heads of one layer: "5:1,6"."""
    return f"{layer}:{','.join(map(str, sorted(heads)))}"


class ProfileState:
    """Measurements by sample, kept in a file if one is given.

    Attributes
    ----------
    signals : dict
        {"samples": [...], "rows": [...], name: nested lists of sums}.
    groups : dict
        Per group of heads made local together, {sample: summed KL}.
    rungs : dict
        Per number of global heads, {sample: [summed KL, summed NLL, correct]}.
    """

    def __init__(self, header: dict[str, Any], path: str | Path | None = None) -> None:
        self._header = {"redknot_profile_state": _FORMAT, **header}
        self._path = None if path is None else Path(path)
        self._written = time.monotonic()
        self.signals: dict[str, Any] = {"samples": []}
        self.groups: dict[str, dict[str, float]] = {}
        self.rungs: dict[str, dict[str, list[float]]] = {}

    def resume(self) -> bool:
        """Read the file, if there is one.

        Raises
        ------
        InputError
            When it was written for another model, other texts or other options.
        """
        if self._path is None or not self._path.exists():
            return False
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            header = data["header"]
            signals, groups, rungs = data["signals"], data["groups"], data["rungs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: no state of a profile; delete it to start") from error
        for key, value in self._header.items():
            if header.get(key) != value:
                raise InputError(
                    f"{self._path}: cannot resume: {key} was {header.get(key)!r}, now it is "
                    f"{value!r}; delete the file to start anew"
                )
        self.signals, self.groups, self.rungs = signals, groups, rungs
        return True

    def add_signals(self, sample: int, sums: dict[str, np.ndarray]) -> None:
        """Add one sample's sums over rows."""
        for name, values in sums.items():
            so_far = np.array(self.signals[name]) if name in self.signals else 0.0
            self.signals[name] = (values + so_far).tolist()
        self.signals["samples"].append(sample)
        self.save()

    def save(self, *, at_once: bool = False) -> None:
        """Write the file, unless that was done moments ago."""
        if self._path is None:
            return
        if not at_once and time.monotonic() - self._written < _SECONDS_BETWEEN_WRITES:
            return
        content = {
            "header": self._header,
            "signals": self.signals,
            "groups": self.groups,
            "rungs": self.rungs,
        }
        write_atomically(self._path, json.dumps(content))
        self._written = time.monotonic()

    def delete(self) -> None:
        """Remove the file: the profile it led to is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
