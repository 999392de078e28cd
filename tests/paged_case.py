"""Builds random paged rows for operator tests; whatever is not a valid slot holds NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from reference.attention import Rows
from torch import Tensor

from redknot import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def isas() -> list[str]:
    """The instruction sets this machine has."""
    from redknot import ops  # noqa: F401  (loads the library)

    def has(isa: str) -> bool:
        try:
            torch.ops.redknot._cpu_isa(isa)
        except RuntimeError:
            return False
        return True

    best = torch.ops.redknot._cpu_isa("")
    found = [isa for isa in ("default", "avx2", "avx512", "amx") if has(isa)]
    torch.ops.redknot._cpu_isa(best)
    return found


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    best = torch.ops.redknot._cpu_isa("")
    torch.ops.redknot._cpu_isa(isa)
    try:
        yield
    finally:
        torch.ops.redknot._cpu_isa(best)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# A run of keys of a row: first true position, length, rotation offset.
Run = tuple[int, int, int]


def paged_rows(
    runs: Sequence[Sequence[Run]],
    q_positions: Sequence[Sequence[int]],
    *,
    group: int = 1,
    head_dim: int = 32,
    page_size: int = 16,
    window: int | Sequence[int] = -1,
    sink: int | Sequence[int] = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Rows:
    """One entry of `runs` per row, one of `q_positions` per sequence."""
    rng = torch.Generator().manual_seed(seed)
    refs = [
        [
            (first + begin, min(page_size, length - begin), offset)
            for first, length, offset in row
            for begin in range(0, length, page_size)
        ]
        for row in runs
    ]
    num_refs = sum(map(len, refs))
    shape = (num_refs + 3, page_size, head_dim)  # some pages stay free
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    pages = iter(torch.randperm(shape[0], generator=rng).tolist())
    lines = []
    for first, valid, offset in (ref for row in refs for ref in row):
        page = next(pages)
        for cache in (k_cache, v_cache):
            cache[page, :valid] = torch.randn(valid, head_dim, generator=rng).to(dtype)
        lines.append((page, first, valid, offset))

    def per_row(value: int | Sequence[int]) -> Tensor:
        values = [value] * len(runs) if isinstance(value, int) else list(value)
        return torch.tensor(values, dtype=torch.int32)

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int()

    num_kv_heads = len(runs) // max(1, len(q_positions))
    positions = [p for seq in q_positions for p in seq]
    num_q_heads = num_kv_heads * group if q_positions else group
    q = torch.randn(len(positions), num_q_heads, head_dim, generator=rng).to(dtype)
    return Rows(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        row_indptr=bounds([len(row) for row in refs]),
        page_refs=torch.tensor(lines, dtype=torch.int32).reshape(-1, 4),
        cu_seqlens_q=bounds([len(seq) for seq in q_positions]),
        q_positions=torch.tensor(positions, dtype=torch.int32),
        row_window=per_row(window),
        row_sink=per_row(sink),
    )


def assert_close(out: Tensor, exact: Tensor, same_dtype: Tensor, floor: float = 2e-6) -> None:
    """Error within twice that of same-dtype torch, cosine > 0.99998, the same inf and nan."""
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert torch.equal(out.isnan(), exact.isnan())
    finite = exact.isfinite()
    got, want, peer = out.double()[finite], exact[finite], same_dtype.double()[finite]
    if not want.numel():
        return
    error, allowed = (got - want).abs().max(), (peer - want).abs().max()
    assert error <= 2 * allowed + floor, f"error {error:.2e}, same-dtype torch {allowed:.2e}"
    if want.norm() > 0:
        cosine = torch.nn.functional.cosine_similarity(got, want, dim=0)
        assert cosine > 0.99998, f"cosine {cosine:.7f}"


def raises(message: str) -> pytest.RaisesExc:
    """The message of a refused argument, literally."""
    import re

    return pytest.raises(RuntimeError, match=re.escape(message))


def plan_of(rows: Rows, workers: int | None = None) -> torch.Tensor:
    return ops.seg_paged_plan(
        rows.row_indptr, rows.cu_seqlens_q, rows.q_positions, rows.row_window, rows.row_sink,
        rows.q.shape[1], rows.k_cache.shape[1], workers,
    )  # fmt: skip
