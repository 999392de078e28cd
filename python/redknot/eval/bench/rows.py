"""One measured case, and a list of them as a table, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redknot.errors import InputError
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.timing import Timing, measure, ratio

__all__ = ["Row", "cells", "check_plot", "measure_row", "plot", "write_json"]


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes
    ----------
    kind : str
        "prefill" or "decode"; what the allocator did; "ffn", "rope" or the like.
    heads : str
        "global", "local" or "mixed"; "-" where heads play no part.
    shape : str
        What a person needs to tell it from its neighbours.
    time_ms, spread_ms : float
        Median, and half of the interquartile range.
    tflops, gbps : float, optional
        Useful FLOPs and bytes by the median time.
    roof_fraction, bound : float, str, optional
        Share of the roofline, and which roof it is: "compute" or "stream".
    ratios : dict
        {peer: how many times faster than it}; one whose spread makes it meaningless is not here.
    peers_ms : dict
        {peer: median time}.
    details : dict
        Numbers of the case: model, batch, context and so on.
    """

    kind: str
    heads: str
    shape: str
    time_ms: float
    spread_ms: float
    tflops: float | None = None
    gbps: float | None = None
    roof_fraction: float | None = None
    bound: str | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    peers_ms: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return dict(vars(self))


def measure_row(
    options: Options,
    roofs: Roofs,
    own: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    *,
    kind: str,
    heads: str = "-",
    shape: str,
    flops: float,
    num_bytes: float,
    seconds: float | None = None,
    details: dict[str, Any] | None = None,
) -> Row:
    """Measure one case beside its peers."""
    options.progress(f"{kind} {heads} {shape}")
    budget = seconds if seconds is not None else (1.0 if options.quick else 6.0)
    timings = measure({"": own, **peers}, seconds=budget, device=options.device)
    return row_of(
        timings, roofs, kind=kind, heads=heads, shape=shape, flops=flops, num_bytes=num_bytes,
        details=details or {},
    )  # fmt: skip


def row_of(
    timings: dict[str, Timing],
    roofs: Roofs,
    *,
    kind: str,
    heads: str,
    shape: str,
    flops: float,
    num_bytes: float,
    details: dict[str, Any],
) -> Row:
    """A row from timings; the one named "" is our own."""
    own = timings[""]
    fraction, bound = roofs.fraction(flops, num_bytes, own.median)
    peers = {name: timing for name, timing in timings.items() if name}
    ratios = {name: ratio(own, timing) for name, timing in peers.items()}
    return Row(
        kind=kind,
        heads=heads,
        shape=shape,
        time_ms=1e3 * own.median,
        spread_ms=1e3 * own.spread,
        tflops=flops / own.median / 1e12,
        gbps=num_bytes / own.median / 1e9,
        roof_fraction=fraction,
        bound=bound,
        ratios={name: value for name, value in ratios.items() if value is not None},
        peers_ms={name: 1e3 * timing.median for name, timing in peers.items()},
        details={**details, "rounds": len(own.samples)},
    )


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table, a column for each peer of any row."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers_ms))
    header = ["shape", "kind", "heads", "ms", "+-", "TFLOP/s", "GB/s", "roof"]
    header += [f"vs {peer}" for peer in peers]
    return header, [
        [
            row.shape,
            row.kind,
            row.heads,
            _number(row.time_ms),
            _number(row.spread_ms),
            _number(row.tflops),
            _number(row.gbps),
            "-" if row.roof_fraction is None else f"{row.roof_fraction:.0%} {row.bound}",
            *(_ratio_text(row, peer) for peer in peers),
        ]
        for row in rows
    ]


def _ratio_text(row: Row, peer: str) -> str:
    if peer not in row.peers_ms:
        return ""
    return f"{row.ratios[peer]:.2f}x" if peer in row.ratios else "unsteady"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_json(path: Path, rows: Sequence[Row], address: dict[str, Any]) -> None:
    """Write a list of rows; each carries the address of its run (command, hardware, versions)."""
    text = json.dumps([{**row.to_dict(), "run": address} for row in rows], indent=1, default=float)
    path.write_text(text + "\n")


def check_plot(path: Path) -> None:
    """Refuse, with InputError, a plot that could not be drawn after minutes of measuring."""
    if path.suffix != ".png":
        raise InputError(f"--plot must be a .png file, got {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'redknot[plot]'")


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw a bar for each row: share of the roofline, and the ratio to every peer.

    `check_plot` says beforehand whether it can be drawn.
    """
    from matplotlib.figure import Figure

    labels = [f"{row.kind} {row.heads} {row.shape}".replace(" - ", " ") for row in rows]
    peers = list(dict.fromkeys(name for row in rows for name in row.ratios))
    figure = Figure(figsize=(13, max(3.0, 1.2 + 0.42 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines = range(len(rows))
    left.barh(lines, [100 * (row.roof_fraction or 0.0) for row in rows], color="#30638e")
    for line, row in zip(lines, rows, strict=True):
        left.text(1, line, f"{_number(row.time_ms)} ms", va="center", color="white", fontsize=8)
    left.set_xlim(0, max(100.0, *(100 * (row.roof_fraction or 0.0) for row in rows)))
    left.set_xlabel("% of the roofline")
    left.set_yticks(list(lines), labels, fontsize=8)
    left.invert_yaxis()
    height = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        given = [(line, row.ratios[peer]) for line, row in enumerate(rows) if peer in row.ratios]
        right.barh(
            [line - 0.4 + (number + 0.5) * height for line, _ in given],
            [value - 1.0 for _, value in given],  # from 1 to the ratio
            height=height,
            left=1.0,
            color=f"C{number}" if number < 10 else str(0.1 * (number % 10)),
            label=f"vs {peer}",
        )
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xlabel("times faster than the peer (log scale)")
    if peers:
        right.set_xscale("log")
        right.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
