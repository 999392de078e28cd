"""Moving cached keys to other positions: `rope_realign`, and in place in their pages.

Peers are eager torch: one rotation by the difference, and the two of the reference implementation
(rotate back, rotate forth).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redknot import ops
from redknot.eval.bench.options import Options
from redknot.eval.bench.paged_inputs import fill_random
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row, measure_row
from redknot.eval.bench.timing import rotating

__all__ = ["run"]

_OFFSET = 4096
_PAGE_SIZE = 64
_MAX_COPIES = 64


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Measure both forms on the keys of one layer."""
    default = ("Llama-3-8B",) if options.quick else ("Llama-3-8B", "Qwen3-32B")
    rows = []
    seen = set()
    for shape in options.shapes(*default).values():
        heads, dim = shape.num_kv_heads, shape.head_dim
        if (heads, dim) in seen:  # only they matter here
            continue
        seen.add((heads, dim))
        quick = 65536 if options.device == "cuda" else 4096  # the result, too, leaves the cache
        for tokens in options.contexts or ((quick,) if options.quick else (1024, 8192, 65536)):
            rows += _measure(tokens, heads, dim, options, roofs)
    return rows


def _measure(tokens: int, heads: int, dim: int, options: Options, roofs: Roofs) -> list[Row]:
    dtype, device = options.torch_dtype, options.device
    key_bytes = tokens * heads * dim * dtype.itemsize
    copies = max(1, min(_MAX_COPIES, -(-options.rotation_bytes // key_bytes)))
    keys = [
        fill_random(torch.empty(tokens, heads, dim, dtype=dtype, device=device), seed=seed)
        for seed in range(copies)
    ]
    inv_freq = (5e5 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)).to(device)
    peers: dict[str, Callable[[], object]] = {}
    if options.wants("eager"):
        positions = torch.arange(tokens, device=device)
        peers = {
            "eager, one rotation": rotating(
                lambda k: _rotate(k, torch.full_like(positions, _OFFSET), inv_freq), keys
            ),
            "eager, two rotations": rotating(
                lambda k: _rotate(_rotate(k, -positions, inv_freq), positions + _OFFSET, inv_freq),
                keys,
            ),
        }
    common: dict[str, Any] = {
        "flops": 3.0 * tokens * heads * dim,
        "num_bytes": 2.0 * key_bytes,
        "details": {"tokens": tokens, "num_kv_heads": heads, "head_dim": dim, "offset": _OFFSET},
    }
    shape = f"{tokens} keys x {heads} heads x {dim}"
    moved = rotating(lambda k: ops.rope_realign(k, _OFFSET, inv_freq), keys)
    rows = [measure_row(options, roofs, moved, peers, kind="rope", shape=shape, **common)]
    pages = tokens * heads // _PAGE_SIZE
    if pages:
        refs = torch.zeros(pages, 4, dtype=torch.int32)
        refs[:, 0] = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        refs[:, 2], refs[:, 3] = _PAGE_SIZE, _OFFSET
        refs = refs.to(device)
        pools = [k.view(-1)[: pages * _PAGE_SIZE * dim].view(pages, _PAGE_SIZE, dim) for k in keys]
        in_pages = rotating(lambda pool: ops.rope_realign_pages(pool, refs, inv_freq), pools)
        rows.append(
            measure_row(options, roofs, in_pages, {}, kind="rope pages", shape=shape, **common)
        )
    return rows


def _rotate(k: Tensor, offsets: Tensor, inv_freq: Tensor) -> Tensor:
    angle = offsets[:, None].float() * inv_freq
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    low, high = k.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return k * angle.cos().to(k.dtype) + turned * angle.sin().to(k.dtype)
