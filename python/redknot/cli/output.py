"""Tables, sizes, progress bars: what the sub-commands print with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redknot.errors import InputError

__all__ = [
    "PhaseBars",
    "bytes_text",
    "check_outputs",
    "print_json",
    "progress_bar",
    "quiet_libraries",
    "table",
]


def check_outputs(*paths: str | Path | None) -> None:
    """Refuse, with InputError, files that could not be written after minutes of work."""
    for path in (Path(path) for path in paths if path is not None):
        was_there = path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            raise InputError(f"{path}: cannot write it: {error.strerror or error}") from None
        if not was_there:
            path.unlink()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content; the first is left-aligned."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [str(row[0]).ljust(widths[0])]
        cells += [str(cell).rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def bytes_text(count: float) -> str:
    """A number of bytes for people: '3.2 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, default=float))


def progress_bar(total: int, description: str, unit: str) -> Any:
    """Return a tqdm bar on stderr, silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        leave=False,
    )


class PhaseBars:
    """Progress of work in phases, one bar at a time; called with (phase, done, total)."""

    def __init__(self) -> None:
        self._phase = ""
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` runs of a phase are done."""
        if phase != self._phase:
            self.close()
            self._phase, self._bar = phase, progress_bar(total, phase, "run")
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the last bar away."""
        if self._bar is not None:
            self._bar.close()


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of the output."""
    if find_spec("transformers") is None:  # only models need it
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
