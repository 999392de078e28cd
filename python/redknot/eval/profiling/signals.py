"""What one dense pass shows of each head: reach, and how much it depends on what stands before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from redknot.eval.profiling.mass import attention_mass
from redknot.eval.profiling.run import DenseLayer, LayerRules, SampleRun

__all__ = ["measure_signals"]


def measure_signals(
    run: SampleRun,
    all_local: LayerRules,
    windows: list[int],
    *,
    sink: int,
    mass_rows: int,
    progress: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Sums over the rows of one sample, per layer and query head.

    Documents alone and the dense prompt pass in step, so that nothing is kept but one layer of
    each.

    Returns
    -------
    dict of arrays
        `covered` [num_layers, num_q_heads, num_windows], `page_share` [num_layers, num_q_heads]
        over `mass_rows` rows of the context and all of the questions; numerators and denominators
        of the shifts, `prefix_moved`, `local_moved`, `prefix_size`, `local_size` [num_layers,
        num_q_heads]; and `rows` [1].
    """
    found: dict[str, list[Tensor]] = {}
    num_rows = 0
    for alone, dense in zip(run.offline_layers(), run.dense_layers(), strict=True):
        layer = dense.layer
        moved = slice(run.first_moved, run.context)
        sums, num_rows = _mass(run, dense, windows, sink, mass_rows)
        difference = dense.attention_out[moved] - alone.attention_out[moved]
        sums["prefix_moved"] = _norms(difference)
        sums["prefix_size"] = _norms(dense.attention_out[moved])
        # All heads local with what was cached; each is seen by itself, before the next layer.
        k, v = dense.k.clone(), dense.v.clone()
        k[: run.context], v[: run.context] = run.move(alone.k), alone.v
        local_out = run.online.attend(
            dense.q,
            k,
            v,
            all_local.windows[layer],
            all_local.sinks[layer],
            run.decoder.softmax_scale,
            run.decoder.softcap,
        )[run.first_moved :]
        sums["local_moved"] = _norms(dense.attention_out[run.first_moved :] - local_out)
        sums["local_size"] = _norms(dense.attention_out[run.first_moved :])
        for name, value in sums.items():
            found.setdefault(name, []).append(value)
        progress()
    arrays = {name: torch.stack(values).cpu().numpy() for name, values in found.items()}
    return {**arrays, "rows": np.array([float(num_rows)])}


def _norms(vectors: Tensor) -> Tensor:
    """Sum over rows of each head's norm, fp64 [num_q_heads]."""
    return vectors.float().norm(dim=-1).double().sum(0)


def _mass(
    run: SampleRun, dense: DenseLayer, windows: list[int], sink: int, mass_rows: int
) -> tuple[dict[str, Tensor], int]:
    """Mass of some rows of the context, and of every question's."""
    native = run.decoder.sliding_windows[dense.layer]
    device = dense.q.device
    every = torch.arange(run.context, device=device)
    if mass_rows < run.context:  # evenly, the last one included
        every = torch.linspace(0, run.context - 1, mass_rows, device=device).round().long().unique()
    grid = torch.tensor(windows, device=device)

    def mass_of(rows: Tensor, k: Tensor) -> dict[str, Tensor]:
        mass = attention_mass(
            dense.q[rows],
            k,
            run.online.positions[rows],
            grid,
            sink=sink,
            softmax_scale=run.decoder.softmax_scale,
            softcap=run.decoder.softcap,
            native_window=-1 if native is None else native,
        )
        return {"covered": mass.covered, "page_share": mass.page_share}

    context_k = dense.k[: run.context]
    sums = mass_of(every, context_k)
    num_rows = len(every)
    for number in range(len(run.sample.asks)):
        own = run.online.rows_of(number)
        rows = torch.arange(own.start, own.stop, device=device)
        more = mass_of(rows, torch.cat([context_k, dense.k[own]]))
        sums = {name: sums[name] + more[name] for name in sums}
        num_rows += len(rows)
    return sums, num_rows
