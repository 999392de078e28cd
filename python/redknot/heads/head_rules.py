"""`HeadRules`: window and sink of every KV head of a model, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from redknot.errors import HeadMapError
from redknot.heads.head_map_checks import frozen, is_int
from redknot.heads.visibility import held_pages, held_tokens, visible_pairs

__all__ = ["HeadRules"]

GLOBAL_WINDOW = -1  # as the ops write it: no limit


class HeadRules:
    """What each head sees and keeps, and what that costs; immutable.

    Raises `HeadMapError` for counts and windows that are none.

    Parameters
    ----------
    is_global : ndarray of bool, [num_layers, num_kv_heads]
    windows, sinks : ndarray of int32, [num_layers, num_kv_heads]
        Read where a head is not global.
    """

    def __init__(
        self, is_global: NDArray[np.bool_], windows: NDArray[np.int32], sinks: NDArray[np.int32]
    ) -> None:
        self._is_global = frozen(is_global)
        self._windows = frozen(np.where(is_global, np.int32(GLOBAL_WINDOW), windows))
        self._sinks = frozen(np.where(is_global, np.int32(0), sinks))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._is_global.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV heads per layer (of this rank, after `slice_heads`)."""
        return self._is_global.shape[1]

    @property
    def is_global(self) -> NDArray[np.bool_]:
        """Heads that keep everything: all but local ones, and the whole dense prefix."""
        return self._is_global

    @property
    def windows(self) -> NDArray[np.int32]:
        """Window of each head, [num_layers, num_kv_heads]; -1 for a global head."""
        return self._windows

    @property
    def sinks(self) -> NDArray[np.int32]:
        """Sink size of each head, [num_layers, num_kv_heads]; 0 for a global head."""
        return self._sinks

    @property
    def global_fraction(self) -> float:
        """Share of all (layer, KV head) pairs that keep everything."""
        return float(self._is_global.mean())

    @property
    def first_global_layer(self) -> int | None:
        """First layer with a global head, None without one."""
        layers = np.flatnonzero(self._is_global.any(axis=1))
        return int(layers[0]) if layers.size else None

    @property
    def last_global_layer(self) -> int | None:
        """Last layer with a global head, None without one."""
        layers = np.flatnonzero(self._is_global.any(axis=1))
        return int(layers[-1]) if layers.size else None

    def rules(
        self, sliding_windows: Sequence[int | None] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return windows and sinks, int32 [num_layers, num_kv_heads], inside the model's own.

        Parameters
        ----------
        sliding_windows : sequence of int or None, [num_layers], optional
            The model's native sliding window of each layer, None where it has none. There a
            global head sees the native window and no sink, and so does a local head whose window
            is not smaller; a smaller one keeps its window and sink.
        """
        windows, sinks = self._windows.copy(), self._sinks.copy()
        if sliding_windows is None:
            return windows, sinks
        if len(sliding_windows) != self.num_layers:
            raise HeadMapError(
                f"the head map has {self.num_layers} layers, but sliding windows of "
                f"{len(sliding_windows)} layers were given"
            )
        for layer, native in enumerate(sliding_windows):
            if native is not None:
                _check_counts(sliding_window=native)
                covered = (windows[layer] < 0) | (windows[layer] >= native)
                windows[layer][covered] = native
                sinks[layer][covered] = 0
        return windows, sinks

    # --- accounting -------------------------------------------------------------------------

    def kv_bytes(
        self,
        context: int,
        *,
        head_dim: int,
        bytes_per_element: int,
        page_size: int | None = None,
        sliding_windows: Sequence[int | None] | None = None,
    ) -> int:
        """Bytes of K and V that one session of `context` tokens holds.

        With `page_size`: whole pages, as a session that shares none holds them after decoding.
        """
        _check_counts(context=context, head_dim=head_dim, bytes_per_element=bytes_per_element)
        windows, sinks = self.rules(sliding_windows)
        if page_size is None:
            tokens = held_tokens(context, windows, sinks)
        else:
            _check_counts(page_size=page_size)
            tokens = held_pages(context, windows, sinks, page_size) * page_size
        return 2 * head_dim * bytes_per_element * int(tokens.sum())

    def kv_bytes_full(
        self, context: int, *, head_dim: int, bytes_per_element: int, page_size: int | None = None
    ) -> int:
        """Bytes of a cache in which every head keeps every token."""
        whole = HeadRules(np.ones_like(self._is_global), self._windows, self._sinks)
        return whole.kv_bytes(
            context, head_dim=head_dim, bytes_per_element=bytes_per_element, page_size=page_size
        )

    def attention_pairs(
        self, context: int, sliding_windows: Sequence[int | None] | None = None
    ) -> NDArray[np.int64]:
        """(query, key) pairs of a causal prefill, int64 [num_layers, num_kv_heads].

        Counted exactly from the visibility rule, per query head: a KV head shared by g query
        heads computes g times its entry.
        """
        _check_counts(context=context)
        return visible_pairs(context, *self.rules(sliding_windows))


def _check_counts(**counts: object) -> None:
    """Refuse what is no int; a context may be 0, all else is at least 1."""
    for name, value in counts.items():
        least = 0 if name == "context" else 1
        if not is_int(value) or value < least:
            raise HeadMapError(f"{name} must be an int of at least {least}, got {value!r}")
