"""What a head map must look like, told in the words of whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from redknot.errors import HeadMapError
from redknot.heads.head_map_files import FILE_KEYS

__all__ = [
    "CLASS_OF_NAME",
    "checked_matrix",
    "checked_metadata",
    "checked_names",
    "frozen",
    "is_int",
    "is_number",
]

# Every class name that is understood, and the class that it means.
CLASS_OF_NAME = {
    "global": "global",
    "dense": "dense",
    "retrieval": "retrieval",
    "local": "local",
    "local_full": "local",
    "limited": "local",
    "streaming": "local",
    "sink_dominant": "local",
}


def is_int(value: object) -> TypeGuard[int]:
    """Return whether value is an integer and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether value is a real number."""
    return is_int(value) or isinstance(value, (float, np.floating))


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Make an array read-only."""
    array.setflags(write=False)
    return array


def _is_row(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))


def checked_names(classes: Any) -> tuple[tuple[str, ...], ...]:
    """Return the class names as tuples, [num_layers][num_kv_heads]."""
    if not _is_row(classes) or len(classes) == 0 or not all(_is_row(row) for row in classes):
        raise HeadMapError("classes must be a non-empty list with one list of names per layer")
    num_heads = len(classes[0])
    for layer, row in enumerate(classes):
        if len(row) != num_heads or num_heads == 0:
            raise HeadMapError(
                f"layer {layer} has {len(row)} head classes, layer 0 has {num_heads}; "
                "every layer needs the same number, at least 1"
            )
        for head, name in enumerate(row):
            if not isinstance(name, str) or name not in CLASS_OF_NAME:
                raise HeadMapError(
                    f"layer {layer}, head {head}: unknown class {name!r}; "
                    f"known are {', '.join(CLASS_OF_NAME)}"
                )
    return tuple(tuple(str(name) for name in row) for row in classes)


def checked_matrix(
    name: str, given: Any, is_local: NDArray[np.bool_], lowest: int, elsewhere: int
) -> NDArray[np.int32]:
    """Return `given` of the local heads as int32 [L, H], `elsewhere` for the others."""
    num_layers, num_heads = is_local.shape
    matrix: NDArray[np.int32] = np.full((num_layers, num_heads), elsewhere, dtype=np.int32)
    if not _is_row(given):
        given = [[given] * num_heads] * num_layers
    if len(given) != num_layers:
        raise HeadMapError(f"{name} has {len(given)} layers, classes has {num_layers}")
    for layer, row in enumerate(given):
        if not _is_row(row) or len(row) != num_heads:
            arrived = f"{len(row)} values" if _is_row(row) else repr(row)
            raise HeadMapError(
                f"{name}, layer {layer}: needs {matrix.shape[1]} values, got {arrived}"
            )
        for head in np.flatnonzero(is_local[layer]):
            value = row[head]
            if not is_int(value) or not lowest <= value < 2**31:
                raise HeadMapError(
                    f"layer {layer}, head {head}: {name} must be an integer >= {lowest}, "
                    f"got {value!r}"
                )
            matrix[layer, head] = value
    return frozen(matrix)


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a deep copy of what JSON can hold."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise HeadMapError(f"metadata must be a mapping, got {metadata!r}")
    kept = dict(metadata or {})
    for key in kept:
        if not isinstance(key, str) or key in FILE_KEYS:
            raise HeadMapError(f"metadata cannot have the key {key!r}")
    try:
        return dict(json.loads(json.dumps(kept)))
    except (TypeError, ValueError) as error:
        raise HeadMapError(f"metadata must be what JSON can hold: {error}") from error
