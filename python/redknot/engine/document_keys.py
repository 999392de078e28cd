"""Documents by id, and the keys of their segments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from redknot.errors import UnknownDocumentError
from redknot.models import Decoder
from redknot.store import segment_key, stored_parts

__all__ = ["DocumentKeys"]

_ID_LENGTH = 16  # hex digits of the key that name a document to the user


class DocumentKeys:
    """Token ids of one engine's documents, and what their segments are called in any store.

    Parameters
    ----------
    decoder : Decoder
        Whose K and V.
    fingerprint : str
        Of the model.
    salt : str
        A tenant's; see `segment_key`.
    prefix_ids : np.ndarray
        The prompt's prefix; may be empty.
    behind_prefix : bool
        Whether documents are computed behind the prefix, or alone from position 0.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        fingerprint: str,
        salt: str,
        prefix_ids: np.ndarray,
        behind_prefix: bool,
    ) -> None:
        self._decoder = decoder
        self._fingerprint, self._salt = fingerprint, salt
        self.prefix_ids = prefix_ids
        self._context_ids = prefix_ids if behind_prefix else prefix_ids[:0]
        self._token_ids: dict[str, np.ndarray] = {}
        self._keys: dict[str, dict[int | None, str]] = {}  # by the layer of the hidden states

    def register(self, token_ids: np.ndarray) -> str:
        """Remember a document and return its id; the same tokens have the same id."""
        key = self._segment_key(self._context_ids, token_ids)
        document = key[:_ID_LENGTH]
        self._token_ids[document] = token_ids
        self._keys.setdefault(document, {None: key})
        return document

    def token_ids(self, document: str) -> np.ndarray:
        """Token ids [num_tokens] of a document.

        Raises
        ------
        UnknownDocumentError
            For an id that `register` did not return.
        """
        try:
            return self._token_ids[document]
        except (KeyError, TypeError):
            raise UnknownDocumentError(
                f"unknown document id {document!r}; Engine.add returns the id of a document"
            ) from None

    def keys(self, documents: Collection[str]) -> set[str]:
        """Keys that a request over `documents` must keep: theirs and the prefix's."""
        keys = {key for document in documents for key in self._keys[document].values()}
        return keys | {self._prefix_key}

    def chain(self, documents: Sequence[str]) -> list[str]:
        """Keys of the prefix and of `documents`, in order: what a recovered chain is known by."""
        return [self._prefix_key, *(self._keys[document][None] for document in documents)]

    def forget(self) -> None:
        """Forget every document."""
        self._token_ids.clear()
        self._keys.clear()

    @cached_property
    def _prefix_key(self) -> str:
        return self._segment_key(self.prefix_ids[:0], self.prefix_ids)

    def _segment_key(
        self, context_ids: np.ndarray, token_ids: np.ndarray, hidden_layer: int | None = None
    ) -> str:
        return segment_key(
            fingerprint=self._fingerprint,
            dtype=self._decoder.dtype,
            inv_freq=self._decoder.inv_freq.cpu().numpy(),
            prefix_ids=context_ids,
            token_ids=token_ids,
            stored=stored_parts(hidden_layer),
            salt=self._salt,
        )
