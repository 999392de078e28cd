"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from redknot.errors import InputError

__all__ = ["write_atomically"]


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write it: {error.strerror or error}") from error
