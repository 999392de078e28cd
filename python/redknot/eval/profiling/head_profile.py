"""`HeadProfile`: what was measured about each head of a model, and head maps made from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redknot.errors import HeadMapError
from redknot.eval.profiling import criteria
from redknot.eval.profiling.files import write_atomically
from redknot.heads import HeadMap
from redknot.recovery import ModelShape

__all__ = ["HeadProfile", "ModelFacts", "Rung", "agreement"]

_FORMAT = 1
_MATRICES = (
    "covered", "prefix_shift", "local_shift", "page_share", "kl", "kl_by_set", "measured_alone",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of the model that classification counts with."""

    name: str
    fingerprint: str
    shape: ModelShape
    bytes_per_element: int
    sliding_windows: list[int | None]


@dataclass(frozen=True)
class Rung:
    """One map that was run: the `num_global` highest heads global, the others local.

    Attributes
    ----------
    kl : float
        Mean KL divergence from dense per answer token, nats.
    nll : float
        Mean loss of the answer tokens, nats.
    accuracy : float
        Share of the answer tokens that are the model's first choice, teacher forced.
    """

    num_global: int
    kl: float
    nll: float
    accuracy: float


@dataclass(frozen=True)
class HeadProfile:
    """Measurements of every head of one model, independent of the context's length in size.

    Attributes
    ----------
    model : ModelFacts
    calibration : dict
        Hash and size of what was read.
    windows : list of int [num_windows]
        Grid of the mass-distance curve, tokens.
    sink : int
    window : int
        Window of a local head in every measurement that makes one local.
    coverage : float
        Share of the mass by which the rungs' windows were chosen from the curve.
    min_kl : float
        KL below which a head, or a group of heads together, counts as without effect.
    covered : [num_layers, num_q_heads, num_windows]
        Mean attention mass inside sink + window.
    prefix_shift : [num_layers, num_q_heads]
        How far a head's output for a document moves when others stand before it, relative.
    local_shift : [num_layers, num_q_heads]
        The same when the head alone is made local with the cached K and V.
    page_share : [num_layers, num_q_heads]
        Share of the pages seen that is needed for 90 % of the mass.
    kl : [num_layers, num_kv_heads] or None
        Mean KL from dense of the answer tokens when that head is made local with its cached K/V.
    kl_by_set : [2, num_layers, num_kv_heads] or None
        The same on every other sample.
    measured_alone : bool [num_layers, num_kv_heads] or None
        False: the head's group had no effect together; its share of that is given.
    rungs : list of Rung
        Whole maps that were run, by rising number of global heads; the last is dense.
    versions : dict
    """

    model: ModelFacts
    calibration: dict[str, Any]
    windows: list[int]
    sink: int
    window: int
    coverage: float
    min_kl: float
    covered: NDArray
    prefix_shift: NDArray
    local_shift: NDArray
    page_share: NDArray
    kl: NDArray | None = None
    kl_by_set: NDArray | None = None
    measured_alone: NDArray | None = None
    rungs: list[Rung] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    # --- signals ----------------------------------------------------------------------------------

    def _per_kv_head(self, values: NDArray) -> NDArray:
        """Largest value of each KV head's query heads: it is as global as the most global one."""
        shape = self.model.shape
        groups = (shape.num_layers, shape.num_kv_heads, shape.group_size, *values.shape[2:])
        return values.reshape(groups).max(axis=2)

    def edge_mass(self, window: int | None = None) -> NDArray:
        """Attention mass outside sink + window, [num_layers, num_kv_heads].

        The window is the measured one by default; the grid's next smaller one is taken.
        """
        window = self.window if window is None else window
        index = max(int(np.searchsorted(self.windows, window, side="right")) - 1, 0)
        return self._per_kv_head(1.0 - self.covered[:, :, index])

    def score(self, signal: str | None = None) -> NDArray:
        """Rank heads by a signal, [num_layers, num_kv_heads]; higher is more global.

        "kl" (the default where it was measured), "local_shift" (the default elsewhere),
        "prefix_shift" or "edge_mass".
        """
        signal = signal or ("kl" if self.kl is not None else "local_shift")
        if signal == "kl":
            if self.kl is None:
                raise HeadMapError("this profile has no causal sensitivity; choose another signal")
            return self.kl
        if signal == "edge_mass":
            return self.edge_mass()
        if signal in ("local_shift", "prefix_shift"):
            return self._per_kv_head(getattr(self, signal))
        raise HeadMapError(
            f"signal must be kl, local_shift, prefix_shift or edge_mass, got {signal!r}"
        )

    def local_windows(self, coverage: float | None = None, min_window: int = 16) -> NDArray:
        """Window of each head were it local, [num_layers, num_kv_heads].

        The smallest one that covers `coverage` of the mass of each of its query heads, but no more
        than the window that was measured: heads of diffuse attention, which a curve alone would
        give everything, have been shown to do without. A coverage of 1 is the measured window.
        """
        coverage = self.coverage if coverage is None else coverage
        if not 0 < coverage <= 1:
            raise HeadMapError(f"coverage must be in (0, 1], got {coverage}")
        # A mass is never quite 1: softmax leaves a little everywhere.
        enough = (self.covered >= coverage) & (coverage < 1)
        grid = np.array(self.windows)
        first = np.where(enough.any(-1), grid[enough.argmax(-1)], grid[-1])
        least = min(min_window, self.window)
        return self._per_kv_head(first).clip(least, self.window).astype(np.int64)

    # --- maps -------------------------------------------------------------------------------------

    def ranking(self, signal: str | None = None, layer_floor: int = 0) -> NDArray:
        """Flat indices of all heads, most global first; each layer's first `layer_floor` ahead."""
        score = self.score(signal)
        if not 0 <= layer_floor <= score.shape[1]:
            raise HeadMapError(
                f"layer_floor must be between 0 and {score.shape[1]}, got {layer_floor}"
            )
        rank_in_layer = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
        return np.lexsort((-score.ravel(), (rank_in_layer >= layer_floor).ravel()))

    def head_map(
        self,
        num_global: int,
        *,
        signal: str | None = None,
        coverage: float | None = None,
        layer_floor: int = 0,
        retrieval_share: float | None = None,
        retrieval_top_p: float = 0.9,
        metadata: dict[str, Any] | None = None,
    ) -> HeadMap:
        """Return the map of the `num_global` highest heads; see `classify`."""
        shape = self.model.shape
        classes = np.full((shape.num_layers, shape.num_kv_heads), "local", dtype=object)
        chosen = self.ranking(signal, layer_floor)[:num_global]
        classes.flat[chosen] = "global"
        if retrieval_share is not None:
            few = self._per_kv_head(self.page_share) <= retrieval_share
            classes[(classes == "global") & few] = "retrieval"
        return HeadMap(
            classes.tolist(),
            window=self.local_windows(coverage),
            sink=self.sink,
            retrieval_top_p=retrieval_top_p,
            metadata=metadata,
        )

    def classify(
        self,
        *,
        global_fraction: float | None = None,
        max_kl: float | None = None,
        max_loss_points: float | None = None,
        kv_bytes: int | None = None,
        flops: float | None = None,
        context: int | None = None,
        signal: str | None = None,
        coverage: float | None = None,
        min_kl: float | None = None,
        layer_floor: int = 0,
        retrieval_share: float | None = None,
        retrieval_top_p: float = 0.9,
    ) -> HeadMap:
        """Make a head map that meets exactly one criterion.

        Parameters
        ----------
        global_fraction : float
            At most this share of all KV heads is global.
        max_kl : float
            As few global heads as kept the mean KL from dense of whole maps under this, in nats
            per answer token.
        max_loss_points : float
            The same by points of teacher-forced accuracy (100 times the share of answer tokens).
        kv_bytes : int
            As many global heads as a session of `context` tokens can hold in so many bytes.
        flops : float
            As many as a prefill of `context` tokens over cached documents (RedKnot as published)
            can compute with.
        context : int, optional
            Tokens of the budgets; default: those of the calibration prompts.
        signal : str, optional
            What heads are ranked by; see `score`. Whole maps were measured for "kl" alone.
        coverage : float, optional
            Share of the mass that a local head's window covers; see `local_windows`.
        min_kl : float, optional
            Heads below it stay local whatever there is room for (default: as measured with). Not
            for `max_kl`, `max_loss_points` and other signals.
        layer_floor : int
            Global heads that each layer has at least; they come first.
        retrieval_share : float, optional
            Global heads that find 90 % of their mass in at most this share of the pages become
            `retrieval`: they keep everything, and read `retrieval_top_p` of their mass.

        Returns
        -------
        HeadMap
            Tied to the model by its fingerprint; its metadata tell criterion and calibration.

        Raises
        ------
        HeadMapError
            For no criterion or several, and for a budget that no map meets.
        """
        given = {
            "global_fraction": global_fraction,
            "max_kl": max_kl,
            "max_loss_points": max_loss_points,
            "kv_bytes": kv_bytes,
            "flops": flops,
        }
        limits = {name: value for name, value in given.items() if value is not None}
        if len(limits) != 1:
            raise HeadMapError(
                f"give exactly one of {', '.join(given)}; got {', '.join(limits) or 'none'}"
            )
        ((name, limit),) = limits.items()
        if limit < 0 or (name == "global_fraction" and limit > 1):
            raise HeadMapError(
                f"{name} must be {'in [0, 1]' if limit > 1 else '>= 0'}, got {limit}"
            )
        options: dict[str, Any] = {
            "signal": signal,
            "coverage": coverage,
            "layer_floor": layer_floor,
            "retrieval_share": retrieval_share,
            "retrieval_top_p": retrieval_top_p,
        }
        if name in ("max_kl", "max_loss_points"):
            num_global = criteria.by_rungs(self, name, float(limit), signal, coverage, layer_floor)
        else:
            most = criteria.worthwhile(self, signal, min_kl, layer_floor)
            num_global = criteria.by_budget(self, name, float(limit), most, context, options)
        used_signal = signal or ("kl" if self.kl is not None else "local_shift")
        metadata: dict[str, Any] = {
            "model": self.model.name,
            "model_fingerprint": self.model.fingerprint,
            "method": _METHODS[used_signal],
            "criterion": {name: limit} | ({"context": context} if context else {}),
            "measured_window": self.window,
            "coverage": self.coverage if coverage is None else coverage,
            "calibration": self.calibration,
            "versions": self.versions,
            "model_shape": {
                **asdict(self.model.shape),
                "bytes_per_element": self.model.bytes_per_element,
                "sliding_windows": self.model.sliding_windows,
            },
        }
        if self.kl is not None:
            metadata["kv_head_kl"] = np.round(self.kl, 6).tolist()
        rung = next((r for r in self.rungs if r.num_global == num_global), None)
        if rung is not None and used_signal == "kl" and not layer_floor and coverage is None:
            metadata["measured"] = asdict(rung)
        stability = self.stability(num_global) if used_signal == "kl" else None
        if stability is not None:
            metadata["stability"] = stability
        return self.head_map(num_global, metadata=metadata, **options)

    # --- stability --------------------------------------------------------------------------------

    def stability(self, num_global: int) -> dict[str, float] | None:
        """Agreement of the maps of `num_global` heads from either half of the samples.

        Returns
        -------
        dict or None
            `global_heads_in_common` is |A and B| / |A or B| of the global heads, `heads_alike` the
            share of all heads with the same class; None with a single sample.
        """
        if self.kl_by_set is None or not np.isfinite(self.kl_by_set).all():
            return None
        maps = []
        for kl in self.kl_by_set:
            part = replace(self, kl=kl)
            maps.append(part.head_map(min(num_global, criteria.worthwhile(part, "kl", None, 0))))
        return agreement(*maps)

    # --- files ------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return everything as plain values, written to `path` when one is given."""
        data = {key: value for key, value in self.__dict__.items() if key not in _MATRICES}
        data["model"] = asdict(self.model)
        data["rungs"] = [asdict(rung) for rung in self.rungs]
        for key in _MATRICES:
            value = getattr(self, key)
            if value is not None and value.dtype != bool:
                value = np.round(value.astype(np.float64), 6)
            data[key] = None if value is None else value.tolist()
        data = {"redknot_profile": _FORMAT, **data}
        if path is not None:
            write_atomically(path, json.dumps(data) + "\n")
        return data

    @classmethod
    def from_json(cls, path: str | Path) -> HeadProfile:
        """Read a profile that `to_json` wrote.

        Raises
        ------
        HeadMapError
            For a file that is none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise HeadMapError(f"{path}: cannot read it: {error.strerror or error}") from error
        except ValueError as error:
            raise HeadMapError(f"{path}: not JSON") from error
        version = data.pop("redknot_profile", None) if isinstance(data, dict) else None
        if version != _FORMAT:
            raise HeadMapError(f"{path}: no profile of this version (format {version})")
        model = data["model"]
        data["model"] = ModelFacts(**{**model, "shape": ModelShape(**model["shape"])})
        data["rungs"] = [Rung(**rung) for rung in data["rungs"]]
        for key in _MATRICES:
            data[key] = None if data[key] is None else np.array(data[key])
        return cls(**data)


_METHODS = {
    "kl": "KL of the answers to dense, one KV head at a time made local with its cached K/V",
    "local_shift": "shift of the head's output when it is made local with its cached K/V",
    "prefix_shift": "shift of the head's output behind another prefix",
    "edge_mass": "attention mass outside sink + window",
}


def agreement(first: HeadMap, second: HeadMap) -> dict[str, float]:
    """How alike two maps of one model are; see `HeadProfile.stability`."""
    a, b = first.is_global, second.is_global
    if a.shape != b.shape:
        raise HeadMapError(f"maps of {a.shape} and {b.shape} heads cannot be compared")
    either = int((a | b).sum())
    return {
        "global_heads_in_common": float((a & b).sum() / either) if either else 1.0,
        "heads_alike": float((a == b).mean()),
    }
