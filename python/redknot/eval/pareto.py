"""The Pareto plot: quality against FLOPs saved, and against the time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from redknot.errors import InputError

__all__ = ["plot_pareto"]

_MARKERS = "osD^vP*X<>"
_MASTERED = 0.8  # dense score of a task that counts; lower than the gates, for short runs


def plot_pareto(rows: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw one row of panels per length: score, mean of the tasks that dense masters.

    Parameters
    ----------
    rows : sequence of dict
        As `make_rows` returns them.
    path : str or Path
        PNG, SVG or PDF, by its ending.
    title : str
        Printed on top.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("--plot needs matplotlib; pip install 'redknot[plot]'") from None
    measured = [row for row in rows if row["num_measured"]]
    if not measured:
        raise InputError("nothing was measured: there is nothing to plot")
    colours = [matplotlib.colormaps["tab20"](i) for i in range(20)]
    policies = list(dict.fromkeys(row["policy"] for row in measured))
    groups = {length: [r for r in measured if r["length"] == length]
              for length in sorted({row["length"] for row in measured})}  # fmt: skip
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(11, 3.6 * len(groups) + 0.9), sharey="row", squeeze=False
    )
    for (length, mine), (left, right) in zip(groups.items(), axes, strict=True):
        dense = {r["task"]: r["score"] for r in mine if r["policy"] == policies[0]}
        tasks = [task for task, score in dense.items() if score >= _MASTERED] or list(dense)
        for number, policy in enumerate(policies):
            own = [r for r in mine if r["policy"] == policy and r["task"] in tasks]
            if not own:
                continue
            score = fmean(r["score"] for r in own)
            style = {
                "color": colours[(2 * number + number // 10) % 20],
                "marker": _MARKERS[number % len(_MARKERS)],
                "markersize": 9,
                "linestyle": "none",
                "label": policy,
                "fillstyle": "none" if own[0]["control"] else "full",
            }
            left.plot(100 * own[0]["flops_saved"], score, **style)
            right.plot(own[0]["ttft_ratio"], score, **style)
        left.set_ylabel(f"{length} tokens\nscore: {', '.join(tasks)}")
        for axis in (left, right):
            axis.axhline(fmean(dense[t] for t in tasks), color="0.6", linewidth=0.8, zorder=0)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.25)
        right.set_xscale("log")
        right.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%gx"))
        right.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[-1][0].set_xlabel("prefill FLOPs saved, %")
    axes[-1][1].set_xlabel("first token, times as fast as dense")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(
        rect=(0, (0.1 + 0.22 * -(-len(labels) // 4)) / figure.get_figheight(), 1, 1)
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
