"""`HeadMap`: one class, window and sink per layer and KV head of a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redknot.errors import HeadMapError, InputError
from redknot.heads import head_map_files as files
from redknot.heads import head_map_text
from redknot.heads.head_map_checks import (
    CLASS_OF_NAME,
    checked_matrix,
    checked_metadata,
    checked_names,
    is_int,
    is_number,
)
from redknot.heads.head_rules import GLOBAL_WINDOW, HeadRules

__all__ = ["HeadMap"]


class HeadMap(HeadRules):
    """Which KV heads keep the whole context, and what the others keep; immutable.

    Parameters
    ----------
    classes : sequence of sequences of str, [num_layers][num_kv_heads]
        "global", "local", "retrieval" or "dense", or an alias of local: "local_full", "limited",
        "streaming", "sink_dominant". All but local count as global; a `retrieval` head reads,
        while decoding, only the pages that carry `retrieval_top_p` of its mass.
    window : int or [num_layers][num_kv_heads], optional
        Newest tokens that a local head sees, itself included; read for local heads only.
    sink : int or [num_layers][num_kv_heads], optional
        First tokens that a local head sees for ever.
    retrieval_top_p : float, optional
        Share of the score mass whose pages a retrieval head reads while decoding; 1: all pages.
    dense_prefix_layers : int, optional
        The first layers whose heads are all global, whatever their class says.
    metadata : mapping, optional
        Anything JSON can hold; "model_fingerprint" is compared by `check_model`.

    Raises
    ------
    HeadMapError
        For anything malformed; the message names layer, head and value.
    """

    def __init__(
        self,
        classes: Sequence[Sequence[str]],
        *,
        window: int | Sequence[Sequence[int]] | NDArray = files.DEFAULT_WINDOW,
        sink: int | Sequence[Sequence[int]] | NDArray = files.DEFAULT_SINK,
        retrieval_top_p: float = 0.9,
        dense_prefix_layers: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._names = checked_names(classes)
        shape = (len(self._names), len(self._names[0]))
        self._classes = tuple(tuple(CLASS_OF_NAME[name] for name in row) for row in self._names)
        if not is_int(dense_prefix_layers) or not 0 <= dense_prefix_layers <= shape[0]:
            raise HeadMapError(
                f"dense_prefix_layers must be between 0 and {shape[0]}, got {dense_prefix_layers!r}"
            )
        if not is_number(retrieval_top_p) or not 0 < retrieval_top_p <= 1:
            raise HeadMapError(f"retrieval_top_p must be in (0, 1], got {retrieval_top_p!r}")
        self._dense_prefix_layers = int(dense_prefix_layers)
        self._retrieval_top_p = float(retrieval_top_p)
        self._metadata = checked_metadata(metadata)
        is_local = np.array([[kind == "local" for kind in row] for row in self._classes])
        # Of heads that are local by class, also inside the dense prefix: what a file says.
        self._class_windows = checked_matrix("window", window, is_local, 1, GLOBAL_WINDOW)
        self._class_sinks = checked_matrix("sink", sink, is_local, 0, 0)
        is_global = ~is_local
        is_global[: self._dense_prefix_layers] = True
        super().__init__(is_global, self._class_windows, self._class_sinks)
        self._whole: HeadMap | None = None

    # --- making one -------------------------------------------------------------------------

    @classmethod
    def all_global(cls, num_layers: int, num_kv_heads: int) -> HeadMap:
        """Exact mode: every head keeps everything."""
        return cls([["global"] * num_kv_heads for _ in range(num_layers)])

    @classmethod
    def all_local(
        cls,
        num_layers: int,
        num_kv_heads: int,
        *,
        window: int = files.DEFAULT_WINDOW,
        sink: int = files.DEFAULT_SINK,
    ) -> HeadMap:
        """Every head keeps `sink` + `window` tokens."""
        classes = [["local"] * num_kv_heads for _ in range(num_layers)]
        return cls(classes, window=window, sink=sink)

    @classmethod
    def prefix_compression(
        cls,
        num_layers: int,
        num_kv_heads: int,
        *,
        layers: Sequence[int] | None = None,
        window: int = 4096,
        sink: int = 128,
    ) -> HeadMap:
        """Local heads in some layers, global ones in all others; no profile is needed.

        `layers` are the compressed ones, by default the first half: with the default window and
        sink this is the operating point published for RedKnot.
        """
        if layers is not None and not isinstance(layers, Collection):
            raise HeadMapError(f"layers must be a list of layers, got {layers!r}")
        chosen = range(num_layers // 2) if layers is None else layers
        for layer in chosen:
            if not is_int(layer) or not 0 <= layer < num_layers:
                raise HeadMapError(f"layer {layer!r} is not one of the model's {num_layers} layers")
        kinds = ["local" if layer in chosen else "global" for layer in range(num_layers)]
        return cls([[kind] * num_kv_heads for kind in kinds], window=window, sink=sink)

    @classmethod
    def from_json(cls, path: str | Path) -> HeadMap:
        """Read a head map file; what is wrong with it is told with the file's name.

        The matrices are trusted, never the prose beside them. Without `kv_head_max_distance` the
        file's `window` is taken (default 512), without `kv_head_sink_size` its `sink_size`
        (default 4); a window <= 0 of a local head stands for 512. Keys without a meaning here are
        kept as metadata.
        """
        data = files.read_json(path)
        try:
            head_map = cls(**files.parse_json(data))
            files.check_counts(data, head_map.num_layers, head_map.num_kv_heads)
            return head_map
        except HeadMapError as error:
            raise HeadMapError(f"{path}: {error}") from None

    @classmethod
    def from_duo_attention(
        cls,
        directory: str | Path,
        *,
        threshold: float | None = None,
        sparsity: float | None = None,
    ) -> HeadMap:
        """Read DuoAttention's `full_attention_heads.tsv` and `config.json`.

        Heads that score at least `threshold` (default 0.5) are global; or, with `sparsity`, that
        fraction of all heads, the lowest scores first, is local. Window and sink are the
        config's `recent_size` and `sink_size`.
        """
        arguments = files.read_duo_attention(directory, threshold, sparsity)
        try:
            return cls(**arguments)
        except HeadMapError as error:
            raise HeadMapError(f"{directory}: {error}") from None

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the content of a head map file, written to `path` when one is given."""
        data = files.to_json(
            self._names,
            self._class_windows,
            self._class_sinks,
            retrieval_top_p=self._retrieval_top_p,
            dense_prefix_layers=self._dense_prefix_layers,
            metadata=self.metadata,
        )
        if path is not None:
            Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return data

    @staticmethod
    def checked(heads: HeadMap) -> HeadMap:
        """Return `heads`; InputError for anything else, such as the path of a file."""
        if not isinstance(heads, HeadMap):
            raise InputError(f"heads must be a HeadMap, got {type(heads).__name__}")
        return heads

    # --- what it says -----------------------------------------------------------------------

    @property
    def whole(self) -> HeadMap:
        """The map that this one is a slice of, else itself: what all ranks must decide alike."""
        return self if self._whole is None else self._whole

    @property
    def classes(self) -> tuple[tuple[str, ...], ...]:
        """Class of each head, [num_layers][num_kv_heads], aliases resolved."""
        return self._classes

    @property
    def class_names(self) -> tuple[tuple[str, ...], ...]:
        """Class names as they were given, aliases included."""
        return self._names

    @property
    def is_retrieval(self) -> NDArray[np.bool_]:
        """Heads of class retrieval outside the dense prefix; they are global ones."""
        found = np.array([[kind == "retrieval" for kind in row] for row in self._classes])
        found[: self._dense_prefix_layers] = False
        return found

    @property
    def retrieval_top_p(self) -> float:
        """Share of the score mass whose pages a retrieval head reads while decoding."""
        return self._retrieval_top_p

    @property
    def dense_prefix_layers(self) -> int:
        """The first layers whose heads are all global."""
        return self._dense_prefix_layers

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of the free metadata."""
        return copy.deepcopy(self._metadata)

    @property
    def sensitivity(self) -> NDArray[np.float64] | None:
        """How far answers move when one head alone is local, fp64 [num_layers, num_kv_heads].

        The KL in nats that `redknot profile` leaves as `kv_head_kl` in the metadata, NaN where a
        head was not measured; None without such a matrix of the map's shape.
        """
        try:
            found = np.asarray(self._metadata.get("kv_head_kl"), dtype=np.float64)
        except (TypeError, ValueError):
            return None
        return found if found.shape == self._is_global.shape else None

    def check_model(
        self, num_layers: int, num_kv_heads: int, fingerprint: str | None = None
    ) -> None:
        """Raise `HeadMapError` when this map was made for another model."""
        if (num_layers, num_kv_heads) != (self.num_layers, self.num_kv_heads):
            raise HeadMapError(
                f"the head map is for {self.num_layers} layers of {self.num_kv_heads} KV heads, "
                f"but the model has {num_layers} layers of {num_kv_heads} KV heads"
            )
        own = self._metadata.get("model_fingerprint")
        if own is not None and fingerprint is not None and own != fingerprint:
            raise HeadMapError(
                f"the head map was measured on another model: its model_fingerprint is {own}, "
                f"this model's is {fingerprint}"
            )

    # --- tensor parallel --------------------------------------------------------------------

    def slice(self, heads: slice | Sequence[int] | NDArray) -> HeadMap:
        """Return the map of some KV heads: a slice or indices, the same in all layers.

        It remembers the `whole`; a file of it does not.
        """
        if isinstance(heads, slice):
            heads = range(*heads.indices(self.num_kv_heads))
        index = np.asarray(heads, dtype=np.int64)
        for head in index:
            if not 0 <= head < self.num_kv_heads:
                raise HeadMapError(f"head {head} is not one of the map's {self.num_kv_heads} heads")
        if index.size == 0:
            raise HeadMapError("a slice of a head map needs at least one KV head")
        metadata = self.metadata
        if self.sensitivity is not None:
            metadata["kv_head_kl"] = [[row[h] for h in index] for row in metadata["kv_head_kl"]]
        part = HeadMap(
            [[row[head] for head in index] for row in self._names],
            window=self._class_windows[:, index],
            sink=self._class_sinks[:, index],
            retrieval_top_p=self._retrieval_top_p,
            dense_prefix_layers=self._dense_prefix_layers,
            metadata=metadata,
        )
        part._whole = self.whole
        return part

    def slice_heads(self, rank: int, world_size: int) -> HeadMap:
        """Return the map of one tensor-parallel rank: an equal, contiguous share of the heads.

        With more ranks than KV heads each head is held by `world_size / num_kv_heads` ranks.
        """
        if not is_int(world_size) or world_size < 1:
            raise HeadMapError(f"world_size must be an int of at least 1, got {world_size!r}")
        if not is_int(rank) or not 0 <= rank < world_size:
            raise HeadMapError(f"rank must be between 0 and {world_size - 1}, got {rank!r}")
        num_heads = self.num_kv_heads
        if num_heads % world_size and world_size % num_heads:
            raise HeadMapError(f"{num_heads} KV heads cannot be split over {world_size} ranks")
        begin = rank * num_heads // world_size
        return self.slice(slice(begin, begin + max(1, num_heads // world_size)))

    def summary(self) -> dict[str, Any]:
        """Return the figures of the map that fit on a few lines, ready for JSON."""
        return head_map_text.summary(self)

    def __str__(self) -> str:
        return head_map_text.describe(self)

    def __repr__(self) -> str:
        return (
            f"HeadMap({self.num_layers} layers x {self.num_kv_heads} KV heads, "
            f"{self.global_fraction:.1%} global)"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadMap):
            return NotImplemented
        own, others = (self, self.whole), (other, other.whole)
        return all(a.to_json() == b.to_json() for a, b in zip(own, others, strict=True))

    __hash__ = None  # type: ignore[assignment]
