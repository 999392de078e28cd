"""The picture of a head map: layers by heads, causal sensitivity, bytes over context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from redknot.errors import InputError

if TYPE_CHECKING:
    from redknot.heads import HeadMap

__all__ = ["plot"]

_LEAST_KL = 1e-6  # what is less is noise of the arithmetic


def plot(path: str, heads: HeadMap, sizes: list[dict[str, float]] | None) -> None:
    """Draw windows and classes of all heads, the KL of each if the map tells it, and the bytes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'redknot[plot]'") from None
    if not path.endswith(".png"):
        raise InputError(f"--plot must name a .png file, got {path}")
    kl = heads.sensitivity
    panels = 1 + (kl is not None) + bool(sizes)
    height = float(np.clip(heads.num_layers / 6, 4, 14))
    figure = Figure(figsize=(5 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    _draw_map(figure, axes.pop(0), heads)
    if kl is not None:
        _draw_sensitivity(figure, axes.pop(0), kl)
    if sizes:
        _draw_bytes(axes.pop(0), sizes)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"{path}: cannot write it: {error.strerror or error}") from error


def _draw_map(figure: Any, axis: Any, heads: HeadMap) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    windows = np.ma.masked_where(heads.is_global, heads.windows)
    colors = colormaps["YlGnBu"].with_extremes(bad="crimson")
    if heads.is_global.all():
        axis.imshow(windows, aspect="auto", interpolation="nearest", cmap=colors)
    else:
        low, high = int(windows.min()), int(windows.max())
        norm = LogNorm(low, high) if high > low else LogNorm(max(low / 4, 0.5), low * 4)
        image = axis.imshow(windows, aspect="auto", interpolation="nearest", cmap=colors, norm=norm)
        bar = figure.colorbar(image, ax=axis, label="window of a local head, tokens")
        ticks = np.unique(windows.compressed())
        if len(ticks) <= 8:
            bar.set_ticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
            bar.minorticks_off()
    legend = [Patch(color="crimson", label="keeps everything")]
    marks = [(i, j) for i, row in enumerate(heads.classes) for j, kind in enumerate(row)
             if kind == "retrieval"]  # fmt: skip
    if marks:
        layers, columns = zip(*marks, strict=True)
        size = float(np.clip(900 / heads.num_layers, 6, 60))
        points = axis.scatter(
            columns, layers, s=size, color="white", marker="D", edgecolors="black"
        )
        points.set_label("retrieval")
        legend.append(points)
    _label(axis, heads.is_global.shape, "head map")
    figure.legend(handles=legend, loc="outside lower left", ncols=2)


def _draw_sensitivity(figure: Any, axis: Any, kl: np.ndarray) -> None:
    from matplotlib.colors import LogNorm

    shown = kl.clip(min=_LEAST_KL)
    norm = LogNorm(_LEAST_KL, max(float(shown.max()), 10 * _LEAST_KL))
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", cmap="magma_r", norm=norm)
    figure.colorbar(image, ax=axis, label="KL of the answers when local, nats")
    _label(axis, kl.shape, "causal sensitivity")


def _label(axis: Any, shape: tuple[int, ...], title: str) -> None:
    axis.set(xlabel="KV head", ylabel="layer", title=title)
    axis.set_xticks(range(0, shape[1], max(1, shape[1] // 8)))
    axis.set_yticks(range(0, shape[0], max(1, shape[0] // 16)))


def _draw_bytes(axis: Any, sizes: list[dict[str, float]]) -> None:
    contexts = [row["context"] for row in sizes]
    for key, label, color in (
        ("full_kv_bytes", "every head keeps everything", "dimgray"),
        ("head_map_kv_bytes", "this map", "crimson"),
    ):
        values = [row[key] / 2**20 for row in sizes]
        axis.plot(contexts, values, marker="o", label=label, color=color)
    last = sizes[-1]
    axis.annotate(
        f"{last['session_ceiling']:.1f}x less",
        (contexts[-1], last["head_map_kv_bytes"] / 2**20),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
    )
    axis.set(xlabel="context, tokens", ylabel="MiB per session", title="KV bytes", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
