"""The files that head maps come in: the field's JSON and DuoAttention's tsv + config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redknot.errors import HeadMapError

__all__ = [
    "DEFAULT_SINK",
    "DEFAULT_WINDOW",
    "FILE_KEYS",
    "check_counts",
    "parse_json",
    "read_duo_attention",
    "read_json",
    "to_json",
]

DEFAULT_WINDOW = 512
DEFAULT_SINK = 4

# Read from the matrices or implied by them; everything else in a file is free metadata.
FILE_KEYS = frozenset(
    {
        "num_layers",
        "num_kv_heads",
        "kv_head_classification",
        "kv_head_max_distance",
        "kv_head_sink_size",
        "retrieval_top_p",
        "dense_prefix_layers",
        "window",
        "sink_size",
    }
)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read one JSON object from a file; every failure is a `HeadMapError` that names it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise HeadMapError(f"{path}: cannot read it: {error.strerror or error}") from error
    except TypeError:
        raise HeadMapError(f"a head map is read from a file, got {path!r}") from None
    except UnicodeDecodeError as error:
        raise HeadMapError(f"{path}: not UTF-8 text") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise HeadMapError(
            f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(data, dict):
        raise HeadMapError(f"{path}: must hold a JSON object, got a {type(data).__name__}")
    return data


def _positive_or_default(window: Any) -> Any:
    """Resolve a window as the files write it: <= 0 stands for the default."""
    is_number = isinstance(window, int) and not isinstance(window, bool)
    return DEFAULT_WINDOW if is_number and window <= 0 else window


def parse_json(data: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `HeadMap` from the content of a head map file."""
    if "kv_head_classification" not in data:
        raise HeadMapError("kv_head_classification is missing: one class per layer and KV head")
    classes = data["kv_head_classification"]
    window = _positive_or_default(data.get("window", DEFAULT_WINDOW))
    if "kv_head_max_distance" in data:
        distances = data["kv_head_max_distance"]
        if isinstance(distances, list) and all(isinstance(row, list) for row in distances):
            distances = [[_positive_or_default(value) for value in row] for row in distances]
        window = distances
    return {
        "classes": classes,
        "window": window,
        "sink": data.get("kv_head_sink_size", data.get("sink_size", DEFAULT_SINK)),
        "retrieval_top_p": data.get("retrieval_top_p", 0.9),
        "dense_prefix_layers": data.get("dense_prefix_layers", 0),
        "metadata": {key: value for key, value in data.items() if key not in FILE_KEYS},
    }


def check_counts(data: dict[str, Any], num_layers: int, num_kv_heads: int) -> None:
    """Raise `HeadMapError` when a file's counts are not those of its matrices."""
    for key, found in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads)):
        if data.get(key, found) != found:
            raise HeadMapError(f"{key} is {data[key]!r}, but kv_head_classification has {found}")


def to_json(
    names: Sequence[Sequence[str]],
    windows: NDArray[np.int32],
    sinks: NDArray[np.int32],
    *,
    retrieval_top_p: float,
    dense_prefix_layers: int,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """Content of a head map file; windows of heads that are not local by class are negative."""
    data = {**metadata, "num_layers": len(names), "num_kv_heads": len(names[0])}
    is_local = windows >= 0
    if is_local.any():  # for readers that know one window only; ours reads the matrices
        data["window"] = int(windows[is_local].max())
        data["sink_size"] = int(sinks[is_local].max())
    data["retrieval_top_p"] = retrieval_top_p
    data["dense_prefix_layers"] = dense_prefix_layers
    data["kv_head_classification"] = [list(row) for row in names]
    data["kv_head_max_distance"] = windows.tolist()
    data["kv_head_sink_size"] = sinks.tolist()
    return data


def read_duo_attention(
    directory: str | Path, threshold: float | None, sparsity: float | None
) -> dict[str, Any]:
    """Arguments of `HeadMap` from `full_attention_heads.tsv` and `config.json`."""
    if threshold is not None and sparsity is not None:
        raise HeadMapError("give either threshold or sparsity, not both")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise HeadMapError(f"sparsity must be between 0 and 1, got {sparsity}")
    path = Path(directory) / "full_attention_heads.tsv"
    try:
        scores = np.loadtxt(path, dtype=np.float64, delimiter="\t", ndmin=2)
    except (OSError, ValueError) as error:
        raise HeadMapError(f"{path}: cannot read a table of head scores: {error}") from error
    if scores.size == 0 or not np.isfinite(scores).all():
        raise HeadMapError(f"{path}: every layer and KV head needs a finite score")
    config = read_json(Path(directory) / "config.json")
    for key in ("sink_size", "recent_size"):
        if key not in config:
            raise HeadMapError(f"{Path(directory) / 'config.json'}: {key} is missing")
    if sparsity is None:
        full = scores >= (0.5 if threshold is None else threshold)
    else:
        full = np.ones(scores.size, dtype=bool)
        lowest_first = np.argsort(scores, axis=None, kind="stable")
        full[lowest_first[: round(sparsity * scores.size)]] = False
        full = full.reshape(scores.shape)
    return {
        "classes": np.where(full, "global", "streaming").tolist(),
        "window": config["recent_size"],
        "sink": config["sink_size"],
        "metadata": {"duo_attention_config": config},
    }
