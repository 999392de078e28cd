"""token_importance and select_tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import DTYPES, isas, raises, use_isa
from reference import selection

from redknot import ops


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def selected(*args: object) -> list[int]:
    indices, count = ops.select_tokens(*args)
    assert indices.dtype == count.dtype == torch.int32 and count.shape == (1,)
    assert (indices[count:] == -1).all()
    return indices[:count].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("head_dim", [64, 40, 7])
def test_importance(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    wide = torch.randn(9, 5, head_dim).to(dtype)
    with use_isa(isa):
        out = ops.token_importance(wide[:, 1:4])
    torch.testing.assert_close(out.double(), selection.token_importance(wide[:, 1:4]))


def test_importance_of_nothing() -> None:
    assert ops.token_importance(torch.empty(0, 2, 8)).shape == (0,)


def test_the_token_that_crosses_is_included() -> None:
    importance = torch.tensor([1.0, 4.0, 2.0, 3.0])  # 4, 7, 9, 10 of 10
    everything = [0, 1, 2, 3]
    for mass, want in [(0.0, []), (0.39, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]),
                       (0.75, [1, 2, 3]), (0.95, everything), (1.0, everything)]:  # fmt: skip
        assert selected(importance, bounds(0, 4), mass, 0, 0) == want


def test_ties_go_to_the_lower_index() -> None:
    assert selected(torch.ones(8), bounds(0, 8), 0.5, 0, 0) == [0, 1, 2, 3]


def test_mass_one_keeps_tokens_without_importance() -> None:
    assert selected(torch.zeros(3), bounds(0, 3), 1.0, 0, 0) == [0, 1, 2]
    assert selected(torch.zeros(3), bounds(0, 3), 0.5, 0, 0) == []


def test_recent_and_floor_count_per_sequence() -> None:
    importance = torch.tensor([9.0, 1, 1, 1, 5, 6, 7, 8, 1])
    cu_seqlens = bounds(0, 4, 4, 9)
    assert selected(importance, cu_seqlens, 0.0, 1, 0) == [3, 8]
    assert selected(importance, cu_seqlens, 0.0, 0, 2) == [0, 1, 6, 7]
    assert selected(importance, cu_seqlens, 0.0, 1, 2) == [0, 3, 7, 8]
    assert selected(importance, cu_seqlens, 0.0, 100, 0) == list(range(9))
    assert selected(importance, cu_seqlens, 0.0, 0, 100) == list(range(9))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    mass=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    recent_n=st.integers(0, 5),
    min_keep=st.integers(0, 8),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_against_the_definition(
    lengths: list[int], mass: float, recent_n: int, min_keep: int, levels: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, levels, (sum(lengths),), generator=rng).float()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    args = (importance, cu_seqlens, mass, recent_n, min_keep)
    assert selected(*args) == selection.select_tokens(*args)


def test_errors() -> None:
    importance, cu_seqlens = torch.ones(4), bounds(0, 4)
    for args, message in [
        ((importance.double(), cu_seqlens, 0.5, 0, 0),
         "importance must be float32 [num_tokens], got float64 [4]"),
        ((importance, cu_seqlens.long(), 0.5, 0, 0),
         "cu_seqlens must be int32 [num_seqs + 1], got int64 [2]"),
        ((importance, bounds(0, 3), 0.5, 0, 0),
         "cu_seqlens must end with num_tokens = 4, got 3"),
        ((importance, bounds(0, 3, 2, 4), 0.5, 0, 0),
         "cu_seqlens must not decrease, got 3 before 2 at 2"),
        ((importance, cu_seqlens, -0.5, 0, 0), "mass must not be negative, got -0.5"),
        ((importance, cu_seqlens, float("nan"), 0, 0), "mass must not be negative, got nan"),
        ((importance, cu_seqlens, 0.5, -1, 0), "recent_n must not be negative, got -1"),
        ((importance, cu_seqlens, 0.5, 0, -1), "min_keep must not be negative, got -1"),
        ((torch.tensor([1, float("nan")]), bounds(0, 2), 0.5, 0, 0),
         "importance must be finite and not negative, got nan at token 1"),
    ]:  # fmt: skip
        with raises("select_tokens: " + message):
            ops.select_tokens(*args)
    with raises("token_importance: attn_out must be float32, bfloat16 or float16 [num_tokens, "
                "num_q_heads, head_dim], got float32 [4]"):  # fmt: skip
        ops.token_importance(importance)
