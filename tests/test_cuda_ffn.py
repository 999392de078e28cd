"""gathered_ffn and rms_norm on a GPU; `-k small` is the part for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from paged_case import assert_close, raises
from reference import selection
from test_cuda_ops import pytestmark  # noqa: F401  (the mark: needs a GPU)
from test_op_ffn import EPS, Ffn
from test_op_linear import Linear
from torch import Tensor

from redknot import ops

HALVES = [torch.bfloat16, torch.float16]


def expect_right(ffn: Ffn, rows: list[int], packed: bool = True, activation: str = "silu") -> None:
    out = ffn.run(rows, packed, activation)
    exact, peer = ffn.exact(torch.float64, activation), ffn.exact(out.dtype, activation)
    if rows:
        assert_close(out[rows], exact[rows], peer[rows])
    chosen = set(rows)
    others = [t for t in range(len(out)) if t not in chosen]
    assert torch.equal(out[others], ffn.residual[others])
    assert torch.equal(ffn.run(rows, packed, activation), out)  # the same bits in every run


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_small_selections(dtype: torch.dtype, packed: bool, activation: str) -> None:
    ffn = Ffn(40, 72, 104, dtype, "cuda")
    for rows in ([], [7], [0, 3, 4, 17, 38], list(range(40))):
        expect_right(ffn, rows, packed, activation)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "count", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4000]
)
def test_numbers_of_rows(count: int, dtype: torch.dtype) -> None:
    ffn = Ffn(4096, 1024, 2816, dtype, "cuda")
    rows = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:count]
    expect_right(ffn, rows.sort().values.tolist(), packed=count % 2 == 0)


def test_both_architectures_kernels_agree() -> None:
    """On Hopper: wgmma beside mma.sync, which other devices run in any case."""
    ffn, rows = Ffn(700, 1024, 2816, torch.bfloat16, "cuda"), list(range(0, 700, 2))
    before = torch.ops.redknot._cuda_arch("")
    try:
        outs = []
        for arch in ("sm_80", "sm_90a"):
            torch.ops.redknot._cuda_arch(arch)
            outs.append(ffn.run(rows))
    finally:
        torch.ops.redknot._cuda_arch(before)
    exact = ffn.exact(torch.float64)
    for out in outs:
        assert_close(out[rows], exact[rows], ffn.exact(torch.bfloat16)[rows])


@pytest.mark.parametrize(("hidden", "ffn_dim"), [(8, 8), (200, 312), (4096, 520), (520, 4096)])
def test_odd_shapes(hidden: int, ffn_dim: int) -> None:
    for count in (3, 40, 300):
        expect_right(Ffn(300, hidden, ffn_dim, torch.bfloat16, "cuda"), list(range(count)))


def test_more_rows_than_one_chunk_takes() -> None:
    ffn = Ffn(8200, 64, 96, torch.bfloat16, "cuda")
    for count in (8191, 8192, 8193, 8200):
        expect_right(ffn, list(range(count)))


def test_small_views_of_wider_tensors() -> None:
    ffn = Ffn(12, 64, 96, torch.bfloat16, "cuda")
    want = ffn.run([1, 2], packed=False)
    for name in ("gate", "up", "down", "residual"):
        tensor = getattr(ffn, name)
        wide = torch.full((len(tensor), tensor.shape[1] + 8), torch.nan, device="cuda")
        setattr(ffn, name, wide.to(tensor.dtype)[:, : tensor.shape[1]].copy_(tensor))
    out = ffn.residual
    indices = torch.tensor([1, 2], device="cuda", dtype=torch.int32)
    count = torch.tensor([2], device="cuda", dtype=torch.int32)
    ops.gathered_ffn(out, ffn.norm, EPS, ffn.gate, ffn.down, indices, count, w_up=ffn.up)
    assert torch.equal(out, want)


def test_ranking_selection_and_ffn_are_one_captured_graph() -> None:
    """The count stays on the device all the way; a replay follows what is selected then."""
    ffn = Ffn(3000, 256, 704, torch.bfloat16, "cuda")
    packed = torch.cat([ffn.gate, ffn.up])
    attn_out = torch.randn(3000, 8, 32, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1700, 3000], device="cuda", dtype=torch.int32)
    residual = ffn.residual.clone()

    def layer() -> Tensor:
        importance = ops.token_importance(attn_out)
        indices, count = ops.select_tokens(importance, cu_seqlens, 0.3, 16, 1)
        ops.gathered_ffn(residual, ffn.norm, EPS, packed, ffn.down, indices, count)
        return count

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # any wait for the device would be an error here
        count = layer()
    exact, peer = ffn.exact(torch.float64), ffn.exact(torch.bfloat16)
    counts = set()
    for scale in (0.0, 1.0, 4.0):  # few rows stand out, or one in three
        attn_out.normal_()
        attn_out[::100] *= 1 + 100 * scale
        residual.copy_(ffn.residual)
        graph.replay()
        torch.cuda.synchronize()
        importance = ops.token_importance(attn_out).cpu()
        rows = selection.select_tokens(importance, cu_seqlens.cpu(), 0.3, 16, 1)
        counts.add(len(rows))
        assert int(count) == len(rows)
        assert_close(residual[rows], exact[rows], peer[rows])
        others = sorted(set(range(3000)) - set(rows))
        assert torch.equal(residual[others], ffn.residual[others])
    assert len(counts) > 1


def test_small_rows_that_do_not_exist_are_skipped() -> None:
    ffn = Ffn(40, 64, 96, torch.bfloat16, "cuda")
    want, out = ffn.run([4, 7]), ffn.residual.clone()
    indices = torch.tensor([4, -1, 40, 10**6, 7], device="cuda", dtype=torch.int32)
    count = torch.tensor([5], device="cuda", dtype=torch.int32)
    packed = torch.cat([ffn.gate, ffn.up])
    ops.gathered_ffn(out, ffn.norm, EPS, packed, ffn.down, indices, count)
    assert torch.equal(out, want)


def test_small_errors() -> None:
    fp32 = Ffn(8, 16, 24, torch.float32, "cuda")
    with raises("gathered_ffn: residual must be bfloat16 or float16 on CUDA, got float32"):
        fp32.run([1])
    odd = Ffn(8, 20, 24, torch.bfloat16, "cuda")
    with raises("gathered_ffn: hidden_dim and ffn_dim must be multiples of 8 on CUDA, got 20 and"):
        odd.run([1])
    ffn = Ffn(8, 16, 24, torch.bfloat16, "cuda")
    ffn.down = torch.zeros(16, 25, device="cuda", dtype=torch.bfloat16)[:, :24]
    with raises("gathered_ffn: w_down must start at a multiple of 16 bytes"):
        ffn.run([1])
    ffn = Ffn(8, 16, 24, torch.bfloat16, "cuda")
    ffn.gate = ffn.gate.cpu()
    with raises("gathered_ffn: w_gate_up must be on cuda:0"):
        ffn.run([1], packed=False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_small_linear(dtype: torch.dtype, norm: bool, bias: bool) -> None:
    linear = Linear(70, 72, 104, dtype, "cuda")
    for rows in (None, [], [5], [3, 0, 69, 3], list(range(65))):
        linear.expect_right(rows, norm, bias)


@pytest.mark.parametrize("count", [1, 16, 64, 65, 1000, 8200])
def test_linear_of_many_sizes(count: int) -> None:
    linear = Linear(count, 1024, 1536, torch.bfloat16, "cuda")
    linear.expect_right(bias=True)
    linear.expect_right(list(range(count // 2, count)), norm=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("hidden", [100, 4096])
def test_small_rms_norm(hidden: int, dtype: torch.dtype) -> None:
    wide = torch.randn(9, 2, hidden, device="cuda").to(dtype)
    x, weight = wide[:, 1], torch.randn(hidden, device="cuda").to(dtype)

    def norm(as_dtype: torch.dtype) -> Tensor:
        wide_x = x.float() if as_dtype is dtype else x.to(as_dtype)
        scaled = wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + EPS)
        return scaled.to(as_dtype) * weight.to(as_dtype)

    out = ops.rms_norm(x, weight, EPS)
    assert out.is_contiguous()
    assert_close(out, norm(torch.float64), norm(dtype))
