"""merge_states, alone and as what makes one attention of two over disjoint keys."""

from __future__ import annotations

import pytest
import torch
from paged_case import DTYPES, assert_close, isas, paged_rows, raises, use_isa
from reference import merge

from redknot import ops


def states(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.randn(num_tokens, num_heads + 1, head_dim + 8).to(dtype)
    return wide[:, 1:, :head_dim], 5 * torch.randn(num_heads, num_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", [(7, 3, 64), (1, 1, 8), (5, 2, 19), (300, 4, 32)])
def test_against_the_definition(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    (out_a, lse_a), (out_b, lse_b) = states(*shape, dtype), states(*shape, dtype)
    out_a[0, 0], lse_a[0, 0] = torch.nan, -torch.inf  # saw no key: may hold anything
    out_b[-1, -1], lse_b[-1, -1] = torch.nan, -torch.inf
    with use_isa(isa):
        out, lse = ops.merge_states(out_a, lse_a, out_b, lse_b)
    want_out, want_lse = merge.merge_states(out_a, lse_a, out_b, lse_b)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, want_out, want_out.to(dtype))
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


def test_two_empty_sides_give_zeros() -> None:
    nan, nothing = torch.full((2, 3, 8), torch.nan), torch.full((3, 2), -torch.inf)
    out, lse = ops.merge_states(nan, nothing, nan, nothing)
    assert torch.equal(out, torch.zeros(2, 3, 8)) and torch.equal(lse, nothing)


def test_no_token() -> None:
    out, lse = ops.merge_states(*[torch.empty(0, 2, 8), torch.empty(2, 0)] * 2)
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0)


def test_attention_over_two_halves_is_attention_over_all() -> None:
    rows = paged_rows([[(0, 70, 0)]], [[69]], group=4, page_size=16)

    def attend(row_indptr: list[int], refs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.seg_paged_attention(
            rows.q, rows.k_cache, rows.v_cache, torch.tensor(row_indptr).int(), refs,
            rows.cu_seqlens_q, rows.q_positions, rows.row_window, rows.row_sink, return_lse=True,
        )  # fmt: skip

    whole = attend([0, 5], rows.page_refs)
    halves = attend([0, 2], rows.page_refs[:2]), attend([0, 3], rows.page_refs[2:])
    torch.testing.assert_close(ops.merge_states(*halves[0], *halves[1]), whole)


def test_errors() -> None:
    out, lse = torch.zeros(2, 3, 8), torch.zeros(3, 2)
    for args, message in [
        ((out.double(), lse, out, lse),
         "out_a must be float32, bfloat16 or float16 [num_tokens, num_q_heads, head_dim], "
         "got float64 [2, 3, 8]"),
        ((out, lse, out.bfloat16(), lse),
         "out_b must be float32 (like out_a) [num_tokens = 2, num_q_heads = 3, head_dim = 8], "
         "got bfloat16 [2, 3, 8]"),
        ((out, lse.mT, out, lse),
         "lse_a must be float32 [num_q_heads = 3, num_tokens = 2], got float32 [2, 3]"),
        ((out, lse, out, lse.double()),
         "lse_b must be float32 [num_q_heads = 3, num_tokens = 2], got float64 [3, 2]"),
    ]:  # fmt: skip
        with raises("merge_states: " + message):
            ops.merge_states(*args)
