"""A head map in a few figures and on a few lines."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from redknot.heads.head_map import HeadMap

__all__ = ["LEGEND", "describe", "summary", "table"]

LETTER_OF_CLASS = {"global": "G", "dense": "D", "retrieval": "R", "local": "."}
LEGEND = ", ".join(f"{letter} {kind}" for kind, letter in LETTER_OF_CLASS.items())


def summary(heads: HeadMap) -> dict[str, Any]:
    """Return the figures of the map that fit on a few lines, ready for JSON."""
    counts = Counter(kind for row in heads.classes for kind in row)
    local = ~heads.is_global
    return {
        "num_layers": heads.num_layers,
        "num_kv_heads": heads.num_kv_heads,
        "heads_per_class": {kind: counts[kind] for kind in LETTER_OF_CLASS},
        "dense_prefix_layers": heads.dense_prefix_layers,
        "global_fraction": heads.global_fraction,
        "first_global_layer": heads.first_global_layer,
        "last_global_layer": heads.last_global_layer,
        "windows": _spread(heads.windows[local]),
        "sinks": _spread(heads.sinks[local]),
    }


def table(heads: HeadMap) -> str:
    """Return one letter per head, one line per run of equal layers (see `LEGEND`)."""
    rows = ["".join(LETTER_OF_CLASS[kind] for kind in row) for row in heads.classes]
    rows[: heads.dense_prefix_layers] = ["D" * heads.num_kv_heads] * heads.dense_prefix_layers
    begins = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1]), len(rows)]
    lines = []
    for begin, end in itertools.pairwise(begins):
        label = str(begin) if end == begin + 1 else f"{begin}-{end - 1}"
        lines.append(f"{label:>9}  {rows[begin]}")
    return "\n".join(lines)


def describe(heads: HeadMap) -> str:
    """Return the summary and the table as text for a reader."""
    facts = summary(heads)
    counts = ", ".join(f"{n} {kind}" for kind, n in facts["heads_per_class"].items() if n)
    lines = [f"{heads.num_layers} layers x {heads.num_kv_heads} KV heads: {counts}"]
    if heads.is_global.any():
        first, last = heads.first_global_layer, heads.last_global_layer
        lines.append(
            f"{heads.global_fraction:.1%} keep the whole context, in layers {first} to {last}"
        )
    else:
        lines.append("no head keeps the whole context")
    windows, sinks = facts["windows"], facts["sinks"]
    if windows:
        lines.append(
            f"local heads: window {_range(windows)} (median {windows['median']:g}), "
            f"sink {_range(sinks)}"
        )
    return "\n".join([*lines, f"   layers  {LEGEND}", table(heads)])


def _spread(values: NDArray[np.int32]) -> dict[str, float] | None:
    if values.size == 0:
        return None
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "max": int(values.max()),
    }


def _range(spread: dict[str, float]) -> str:
    low, high = spread["min"], spread["max"]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
