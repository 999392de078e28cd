"""token_importance, select_tokens and merge_states on a GPU; `-k small` for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from paged_case import assert_close
from reference import merge, selection
from test_cuda_ops import DTYPES, SIZES, pytestmark  # noqa: F401  (the mark: needs a GPU)

from redknot import ops


@pytest.mark.parametrize("head_dim", [64, 128, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_heads"), SIZES)
def test_importance(num_tokens: int, num_heads: int, dtype: torch.dtype, head_dim: int) -> None:
    wide = torch.randn(num_tokens, num_heads + 1, head_dim, device="cuda").to(dtype)
    got = ops.token_importance(wide[:, 1:])
    torch.testing.assert_close(got.double(), selection.token_importance(wide[:, 1:]))


@pytest.mark.parametrize("mass", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize(
    "lengths", [pytest.param([3, 0, 40], id="small"), [1, 1023, 1024, 1025, 0, 9000]]
)
def test_selection(lengths: list[int], levels: int, mass: float) -> None:
    torch.manual_seed(0)
    importance = torch.rand(sum(lengths))
    importance = (importance * levels).floor() if levels else (8 * importance - 4).exp2()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    for recent_n, min_keep in [(0, 0), (5, 0), (0, 30), (5, 30)]:
        rule = (mass, recent_n, min_keep)
        indices, count = ops.select_tokens(importance.cuda(), cu_seqlens.cuda(), *rule)
        want = selection.select_tokens(importance, cu_seqlens, *rule)
        assert indices[: int(count)].tolist() == want
        assert (indices[int(count) :] == -1).all()


def test_ranking_and_selection_are_one_graph() -> None:
    """The count stays on the device: nothing in between waits for the host."""
    attn_out = torch.randn(5000, 8, 128, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1700, 5000], device="cuda", dtype=torch.int32)

    def select() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.select_tokens(ops.token_importance(attn_out), cu_seqlens, 0.3, 16, 1)

    select()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, count = select()
    for _ in range(3):
        attn_out.normal_()
        graph.replay()
        want_indices, want_count = select()
        assert torch.equal(count, want_count) and torch.equal(indices, want_indices)


@pytest.mark.parametrize("head_dim", [64, 19])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_heads"), SIZES)
def test_merge(num_tokens: int, num_heads: int, dtype: torch.dtype, head_dim: int) -> None:
    outs = torch.randn(2, num_tokens, num_heads, head_dim, device="cuda").to(dtype)
    lses = 5 * torch.randn(2, num_heads, num_tokens, device="cuda")
    outs[0, 0, 0], lses[0, 0, 0] = torch.nan, -torch.inf
    outs[:, -1, -1], lses[:, -1, -1] = torch.nan, -torch.inf
    out, lse = ops.merge_states(outs[0], lses[0], outs[1], lses[1])
    want_out, want_lse = merge.merge_states(outs[0], lses[0], outs[1], lses[1])
    assert_close(out, want_out, want_out.to(dtype))
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
