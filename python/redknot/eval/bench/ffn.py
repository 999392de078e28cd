"""The FFN of selected tokens (`gathered_ffn`) of one layer: kept fractions of a prompt, few rows.

Peers: the F.linear chain on the same rows (gather, norm, three projections, scatter-add), and the
same chain on all tokens, the dense FFN: cuBLAS on a GPU; on Hopper also the kernels of sm_80.
Beside it a projection of few rows (`gathered_linear`, of the size of the output projection), whose
peer is F.linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from redknot import ops
from redknot.eval.bench.options import Options, cuda_arch, is_hopper
from redknot.eval.bench.paged_inputs import fill_random
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row, measure_row
from redknot.eval.bench.timing import rotating
from redknot.recovery import ModelShape

__all__ = ["run"]

_EPS = 1e-5
_FRACTIONS = (0.05, 0.1, 0.2, 0.5, 1.0)
_FEW_ROWS = (1, 2, 4, 8, 16, 32, 64)
_MANY_ROWS = (128, 256, 512, 1024, 2048, 4096)
_QUICK_ROWS = {"cpu": (1, 8, 32), "cuda": (1, 16, 64, 512)}
_MIN_COSINE = 0.999


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def random(cls, shape: ModelShape, options: Options, seed: int) -> _Layer:
        def weight(*size: int) -> Tensor:
            empty = torch.empty(size, dtype=options.torch_dtype, device=options.device)
            return fill_random(empty, scale=size[-1] ** -0.5, seed=seed)

        hidden, ffn = shape.hidden_dim, shape.ffn_dim
        norm = torch.ones(hidden, dtype=options.torch_dtype, device=options.device)
        return cls(norm, weight(ffn, hidden), weight(ffn, hidden), weight(hidden, ffn))

    def gathered(self, residual: Tensor, indices: Tensor, count: Tensor) -> None:
        """Our operator."""
        ops.gathered_ffn(
            residual, self.norm, _EPS, self.gate, self.down, indices, count, w_up=self.up
        )

    def chain(self, residual: Tensor, rows: Tensor) -> None:
        """The same in torch, every step a call of the library."""
        normed = F.rms_norm(residual[rows], (residual.shape[1],), self.norm, _EPS)
        activated = F.silu(F.linear(normed, self.gate)) * F.linear(normed, self.up)
        residual.index_add_(0, rows, F.linear(activated, self.down))


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Measure every fraction and number of rows."""
    default = ("Llama-3-8B",) if options.quick else ("Llama-3-8B", "Qwen3-32B")
    rows = []
    for name, shape in options.shapes(*default).items():
        is_short = options.quick and options.device == "cpu"
        tokens = options.contexts or ((1024,) if is_short else (8192,))
        layer_bytes = 3 * shape.hidden_dim * shape.ffn_dim * options.torch_dtype.itemsize
        copies = max(1, min(2, options.rotation_bytes // layer_bytes))
        layers = [_Layer.random(shape, options, seed) for seed in range(copies)]
        for num_tokens in tokens:
            few = _QUICK_ROWS[options.device] if options.quick else (*_FEW_ROWS, *_MANY_ROWS)
            cases: list[tuple[int, float | None]] = [(n, None) for n in few if n < num_tokens]
            cases += [(max(1, round(f * num_tokens)), f) for f in _FRACTIONS]
            for num_rows, kept in cases:
                options.progress(f"ffn {name} {num_rows} rows")
                rows.append(
                    _measure(name, shape, layers, num_tokens, num_rows, kept, options, roofs)
                )
        few = _QUICK_ROWS[options.device] if options.quick else _FEW_ROWS
        rows += _measure_projections(name, shape, few, options, roofs)
    return rows


def _measure_projections(
    name: str, shape: ModelShape, few: tuple[int, ...], options: Options, roofs: Roofs
) -> list[Row]:
    """A square projection, of so many weights in turn that none is still in the cache."""
    size, dtype = shape.hidden_dim, options.torch_dtype
    copies = max(2, -(-options.rotation_bytes // (size * size * dtype.itemsize)))
    empty = torch.empty(copies, size, size, dtype=dtype, device=options.device)
    weights = fill_random(empty, scale=size**-0.5).unbind(0)
    rows = []
    for num_rows in few:
        x = fill_random(torch.empty(num_rows, size, dtype=dtype, device=options.device))
        ours, theirs = ops.gathered_linear(x, weights[0]), F.linear(x, weights[0])
        _compare("gathered_linear and F.linear", ours, theirs)
        peer = rotating(partial(F.linear, x), weights)
        rows.append(
            measure_row(
                options,
                roofs,
                rotating(partial(ops.gathered_linear, x), weights),
                {"F.linear": peer} if options.wants("linear") else {},
                kind="linear",
                shape=f"{name} {num_rows} rows",
                flops=2.0 * num_rows * size * size,
                num_bytes=dtype.itemsize * size * (size + 2.0 * num_rows),
                details={"model": name, "rows": num_rows},
            )
        )
    return rows


def _measure(
    name: str,
    shape: ModelShape,
    layers: list[_Layer],
    num_tokens: int,
    num_rows: int,
    fraction: float | None,
    options: Options,
    roofs: Roofs,
) -> Row:
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randperm(num_tokens, generator=rng)[:num_rows].sort().values.to(options.device)
    indices = chosen.int()
    count = torch.tensor([num_rows], dtype=torch.int32, device=options.device)
    residual = fill_random(
        torch.empty(num_tokens, shape.hidden_dim, dtype=options.torch_dtype, device=options.device)
    )
    _check(layers[0], residual, indices, count, chosen)
    every = torch.arange(num_tokens, device=options.device)
    peers: dict[str, Callable[[], object]] = {}
    if options.wants("linear"):
        peers["F.linear chain"] = rotating(lambda layer: layer.chain(residual, chosen), layers)
    is_slow = options.quick and options.device == "cpu"
    if options.wants("dense") and fraction is not None and fraction < 1 and not is_slow:
        peers["dense, all tokens"] = rotating(lambda layer: layer.chain(residual, every), layers)
    if is_hopper(options.device):

        def on_sm_80(layer: _Layer) -> None:
            with cuda_arch("sm_80"):
                layer.gathered(residual, indices, count)

        peers["redknot on sm_80"] = rotating(on_sm_80, layers)
    itemsize = options.torch_dtype.itemsize
    weights = 3 * shape.hidden_dim * shape.ffn_dim
    kept = "" if fraction is None else f" of {num_tokens} ({fraction:.0%})"
    return measure_row(
        options,
        roofs,
        rotating(lambda layer: layer.gathered(residual, indices, count), layers),
        peers,
        kind="ffn",
        shape=f"{name} {num_rows} rows{kept}",
        flops=2.0 * weights * num_rows,
        num_bytes=itemsize * (weights + 2.0 * num_rows * shape.hidden_dim),
        details={"model": name, "rows": num_rows, "tokens": num_tokens, "keep_fraction": fraction},
    )


def _check(layer: _Layer, residual: Tensor, indices: Tensor, count: Tensor, chosen: Tensor) -> None:
    ours, theirs = residual.clone(), residual.clone()
    layer.gathered(ours, indices, count)
    layer.chain(theirs, chosen)
    our_part, their_part = ((x - residual)[chosen] for x in (ours, theirs))
    _compare("gathered_ffn and the F.linear chain", our_part, their_part)


def _compare(what: str, ours: Tensor, theirs: Tensor) -> None:
    cosine = float(F.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0))
    if not cosine > _MIN_COSINE:
        raise RuntimeError(f"{what} differ (cosine {cosine:.5f})")
