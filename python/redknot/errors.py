"""Every error that redknot raises on purpose, in one place; all are `RedknotError`."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "HeadMapError",
    "InputError",
    "ModelError",
    "RedknotError",
    "StoreDamagedError",
    "StoreError",
    "UnknownDocumentError",
]


class RedknotError(Exception):
    """Base of all errors; its text is one line that says what to do next."""


class InputError(RedknotError, ValueError):
    """A document, question or option that cannot be used as given."""


class HeadMapError(RedknotError, ValueError):
    """A head map that is malformed, or was made for another model."""


class ModelError(RedknotError, ValueError):
    """A model (or a part of it) that redknot does not support or cannot load."""


class UnknownDocumentError(RedknotError, KeyError):
    """A document id that this engine never handed out."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class BudgetError(RedknotError, MemoryError):
    """The KV budget cannot hold the request; nothing was changed."""


class StoreError(RedknotError):
    """A store that cannot be opened or used: not there, damaged, or of another format."""


class StoreDamagedError(StoreError):
    """A store whose files are not what was written."""
