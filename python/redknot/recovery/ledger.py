"""The FLOPs ledger: what a prefill computed, against dense prefill of the same tokens.

One multiply-add counts two. Only columns and rows that were really computed are counted; attention
counts every visible (query head, key) pair exactly, from the visibility rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from redknot.recovery.plan import PromptLayout

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


def own_keys(positions: np.ndarray, window: int, layout: PromptLayout) -> int:
    """Count the keys of prefix and own document that document rows see (window < 0: all)."""
    begins = np.array([document.begin for document in layout.documents], dtype=np.int64)
    own = begins[np.searchsorted(begins, positions, side="right") - 1]
    seen_from = np.zeros_like(positions) if window < 0 else np.maximum(positions - window + 1, 0)
    prefix = np.maximum(layout.prefix_end - seen_from, 0)
    return int((prefix + positions - np.maximum(own, seen_from) + 1).sum())


def _on_host(positions: np.ndarray | Tensor) -> np.ndarray:
    return positions.cpu().numpy() if isinstance(positions, Tensor) else positions


@dataclass
class FlopCounter:
    """Adds up FLOPs by part while a prefill runs."""

    shape: ModelShape
    parts: dict[str, float] = field(default_factory=dict)
    _later: list[Callable[[], None]] = field(default_factory=list)

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

    def attention(
        self, positions: np.ndarray | Tensor, windows: np.ndarray, sinks: np.ndarray
    ) -> None:
        """QK and PV of one layer; windows, sinks [num_kv_heads]; positions of the query rows.

        Counted when the ledger is closed, so that nothing waits for positions on the device.
        """
        self._later.append(lambda: self._attention("attention", positions, windows, sinks))

    def _attention(
        self,
        part: str,
        positions: np.ndarray | Tensor,
        windows: np.ndarray,
        sinks: np.ndarray,
    ) -> None:
        rows = _on_host(positions)
        rules = Counter(zip(windows.tolist(), sinks.tolist(), strict=True))
        pairs = sum(
            count * visible_keys(rows, window, sink) for (window, sink), count in rules.items()
        )
        self._pairs(part, pairs)

    def _pairs(self, part: str, pairs: int) -> None:
        """QK and PV of (KV head, query row, key) triples."""
        self._add(part, 4.0 * self.shape.head_dim * self.shape.group_size * pairs)

    def probe(self, positions: Tensor, windows: np.ndarray, *, columns: int) -> None:
        """Queries, rotation, attention and norm of some KV heads alone.

        `windows` [num_heads] are theirs, `columns` for how many heads queries were computed.
        """
        shape, rows = self.shape, len(positions)
        dims = shape.group_size * shape.head_dim
        self._add("probe", 2.0 * rows * shape.hidden_dim * columns * dims)
        self._add("probe", (3.0 + 2.0) * rows * len(windows) * dims)
        no_sink = np.zeros_like(windows)
        self._later.append(lambda: self._attention("probe", positions, windows, no_sink))

    def own_attention(self, positions: Tensor, windows: np.ndarray, layout: PromptLayout) -> None:
        """Attention of document rows to the prefix and their own document, and the difference.

        `windows` [num_heads] of the global heads that it runs for.
        """
        rows, shape = len(positions), self.shape
        self._add("probe", 4.0 * rows * len(windows) * shape.group_size * shape.head_dim)

        def count() -> None:
            host = _on_host(positions)
            self._pairs("probe", sum(own_keys(host, int(w), layout) for w in windows))

        self._later.append(count)

    def reading(self, rows: int, keys: int, num_kv_heads: int) -> None:
        """Weights of `keys` keys of some KV heads, turned to their places, in `rows` rows."""
        shape = self.shape
        self._add("probe", 3.0 * keys * num_kv_heads * shape.head_dim)
        self._add("probe", 2.0 * rows * keys * num_kv_heads * shape.group_size * shape.head_dim)

    def kv_shift(self, rows: int, num_kv_heads: int) -> None:
        """Squared distances of new K and V from cached ones."""
        self._add("selection", 6.0 * rows * num_kv_heads * self.shape.head_dim)

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
        self._later.append(lambda: self.ffn(int(count)))

    def close(self) -> dict[str, float]:
        """Read what stayed on the device and return the parts."""
        for count in self._later:
            count()
        self._later.clear()
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
        FLOPs by part: projections, attention, rotation, ffn, lm_head; probe, what it takes to know
        what global heads bring in; selection, other scores of rows.
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
