"""The FLOPs ledger: what a prefill computed, against dense prefill of the same tokens.

One multiply-add counts two. Only columns and rows that were really computed are counted; attention
counts every visible (query head, key) pair exactly, from the visibility rule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

__all__ = ["FlopCounter", "Ledger", "ModelShape", "dense_prefill_flops", "visible_keys"]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that FLOPs and bytes depend on."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    ffn_dim: int
    vocab_size: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads


def visible_keys(positions: np.ndarray, window: int, sink: int) -> int:
    """Count the keys that queries at `positions` see under one head's rule (window < 0: global)."""
    seen = positions.astype(np.int64) + 1
    if window < 0:
        return int(seen.sum())
    outside = np.maximum(seen - window, 0)
    return int((seen - outside + np.minimum(outside, sink)).sum())


@dataclass
class FlopCounter:
    """Adds up FLOPs by part while a prefill runs."""

    shape: ModelShape
    parts: dict[str, float] = field(default_factory=dict)
    _ffn_counts: list[Tensor] = field(default_factory=list)

    def _add(self, part: str, flops: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + flops

    def query_and_output(self, rows: int) -> None:
        """Q and O of all heads for `rows` live rows."""
        shape = self.shape
        self._add("projections", 4.0 * rows * shape.hidden_dim * shape.num_q_heads * shape.head_dim)

    def key_value(self, rows: int, num_kv_heads: int) -> None:
        """K and V columns of `num_kv_heads` heads for `rows` rows."""
        self._add(
            "projections", 4.0 * rows * self.shape.hidden_dim * num_kv_heads * self.shape.head_dim
        )

    def attention(self, positions: np.ndarray, windows: np.ndarray, sinks: np.ndarray) -> None:
        """QK and PV of one layer; windows, sinks [num_kv_heads]; positions of the query rows."""
        rules = Counter(zip(windows.tolist(), sinks.tolist(), strict=True))
        pairs = sum(
            count * visible_keys(positions, window, sink) for (window, sink), count in rules.items()
        )
        self._add("attention", 4.0 * self.shape.head_dim * self.shape.group_size * pairs)

    def rotation(self, head_rows: int) -> None:
        """Rotations of `head_rows` vectors of head_dim (three operations an element)."""
        self._add("rotation", 3.0 * head_rows * self.shape.head_dim)

    def selection(self, rows: int) -> None:
        """Importance (a norm over all heads) of `rows` rows."""
        self._add("selection", 2.0 * rows * self.shape.num_q_heads * self.shape.head_dim)

    def ffn(self, rows: int) -> None:
        """Gate, up and down projections for `rows` rows."""
        self._add("ffn", 6.0 * rows * self.shape.hidden_dim * self.shape.ffn_dim)

    def ffn_later(self, count: Tensor) -> None:
        """Like `ffn`, for a count [1] on the device; it is read when the ledger is closed."""
        self._ffn_counts.append(count)

    def close(self) -> dict[str, float]:
        """Read the counts that stayed on the device and return the parts."""
        for count in self._ffn_counts:
            self.ffn(int(count))
        self._ffn_counts.clear()
        return dict(self.parts)

    def lm_head(self) -> None:
        """Logits of the last row alone."""
        self._add("lm_head", 2.0 * self.shape.hidden_dim * self.shape.vocab_size)


def dense_prefill_flops(
    shape: ModelShape, num_tokens: int, windows: np.ndarray, *, cached_tokens: int = 0
) -> float:
    """FLOPs of dense prefill of `num_tokens`, with the first `cached_tokens` already in the cache.

    `windows` [num_layers, num_kv_heads] are the model's own (-1, or its native sliding window).
    """
    counter = FlopCounter(shape)
    rows = num_tokens - cached_tokens
    positions = np.arange(cached_tokens, num_tokens)
    no_sink = np.zeros(shape.num_kv_heads, dtype=np.int32)
    for layer_windows in windows:
        counter.query_and_output(rows)
        counter.key_value(rows, shape.num_kv_heads)
        counter.rotation(rows * (shape.num_q_heads + shape.num_kv_heads))
        counter.attention(positions, layer_windows, no_sink)
        counter.ffn(rows)
    counter.lm_head()
    return sum(counter.close().values())


@dataclass(frozen=True)
class Ledger:
    """What one prefill cost.

    Attributes
    ----------
    parts : dict
        FLOPs by part: projections, attention, rotation, selection, ffn, lm_head.
    dense_flops : float
        Dense prefill of the same token stream.
    prefix_cached_dense_flops : float
        The same when the shared prefix alone is cached, which any engine would do.
    offline_flops : float
        One-off cost of caching the request's documents.
    """

    parts: dict[str, float]
    dense_flops: float
    prefix_cached_dense_flops: float
    offline_flops: float

    @property
    def flops(self) -> float:
        """FLOPs of this prefill."""
        return sum(self.parts.values())

    @property
    def saved(self) -> float:
        """Fraction of the dense prefill's FLOPs that was not computed."""
        return 1.0 - self.flops / self.dense_flops

    @property
    def saved_over_prefix_cache(self) -> float:
        """The same against dense prefill with a cached prefix."""
        return 1.0 - self.flops / self.prefix_cached_dense_flops

    @property
    def break_even_reuses(self) -> float:
        """After how many prefills the offline cost is paid back (inf: never)."""
        gain = self.dense_flops - self.flops
        return self.offline_flops / gain if gain > 0 else float("inf")

    def to_dict(self) -> dict[str, object]:
        """All figures, for JSON."""
        return {
            "flops": self.flops,
            "parts": dict(self.parts),
            "dense_flops": self.dense_flops,
            "prefix_cached_dense_flops": self.prefix_cached_dense_flops,
            "offline_flops": self.offline_flops,
            "saved": self.saved,
            "saved_over_prefix_cache": self.saved_over_prefix_cache,
            "break_even_reuses": self.break_even_reuses,
        }
