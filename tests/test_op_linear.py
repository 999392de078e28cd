"""gathered_linear: a linear layer of selected rows, with norm and bias where wanted."""

from __future__ import annotations

import pytest
import torch
from paged_case import DTYPES, assert_close, isas, raises, use_isa, use_threads
from torch import Tensor

from redknot import ops

EPS = 1e-5


class Linear:
    """Rows, weight, bias and norm of one layer."""

    def __init__(
        self, rows: int, in_dim: int, out_dim: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        rng = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(device, dtype)

        self.x, self.weight = randn(rows, in_dim), randn(out_dim, in_dim) * in_dim**-0.5
        self.bias, self.norm = randn(out_dim), 1 + randn(in_dim) / 8

    def want(self, dtype: torch.dtype, rows: list[int], norm: bool, bias: bool) -> Tensor:
        x, weight = self.x[rows].to(dtype), self.weight.to(dtype)
        if norm:
            wide = x.to(torch.promote_types(dtype, torch.float32))
            scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
            x = (wide * scale).to(dtype) * self.norm.to(dtype)
        return x @ weight.T + (self.bias.to(dtype) if bias else 0)

    def expect_right(
        self, rows: list[int] | None = None, norm: bool = False, bias: bool = False
    ) -> Tensor:
        selection: dict[str, Tensor] = {}
        if rows is not None:
            padded = rows + [-1] * max(0, len(self.x) - len(rows))
            device = self.x.device
            selection["indices"] = torch.tensor(padded, dtype=torch.int32, device=device)
            selection["count"] = torch.tensor([len(rows)], dtype=torch.int32, device=device)
        out = ops.gathered_linear(
            self.x,
            self.weight,
            self.bias if bias else None,
            norm_weight=self.norm if norm else None,
            eps=EPS,
            **selection,
        )
        assert out.is_contiguous() and len(out) == len(selection.get("indices", self.x))
        rows = list(range(len(self.x))) if rows is None else rows
        exact = self.want(torch.float64, rows, norm, bias)
        assert_close(out[: len(rows)], exact, self.want(out.dtype, rows, norm, bias))
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("in_dim", "out_dim"), [(64, 96), (72, 100)])
def test_norm_bias_and_selection(isa: str, dtype: torch.dtype, in_dim: int, out_dim: int) -> None:
    linear = Linear(70, in_dim, out_dim, dtype)
    with use_isa(isa):
        for norm in (False, True):
            for bias in (False, True):
                linear.expect_right(None, norm, bias)
                linear.expect_right([3, 0, 69, 3], norm, bias)  # a row may be taken twice


@pytest.mark.parametrize("rows", [[], [5], list(range(64)), list(range(65))])
def test_none_one_few_and_more(rows: list[int]) -> None:
    Linear(70, 64, 96, torch.float32).expect_right(rows, norm=True, bias=True)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("in_dim", [32, 512, 544, 1120, 1568])
def test_many_rows(isa: str, in_dim: int) -> None:
    # Whole blocks of rows, columns and depth on tiles, and parts of them.
    with use_isa(isa):
        Linear(512, in_dim, 2048, torch.bfloat16).expect_right()
        linear = Linear(301, in_dim, 2080, torch.bfloat16)
        linear.expect_right(bias=True)
        linear.expect_right(list(range(300, 0, -1)), norm=True)


@pytest.mark.parametrize("isa", [isa for isa in isas() if isa == "amx"])
def test_many_rows_do_not_depend_on_threads_or_on_each_other(isa: str) -> None:
    linear = Linear(600, 1120, 2336, torch.bfloat16)
    with use_isa(isa):
        with use_threads(1):
            alone = ops.gathered_linear(linear.x, linear.weight)
        for threads in (2, 3, 4):
            with use_threads(threads):
                assert torch.equal(ops.gathered_linear(linear.x, linear.weight), alone)
        for rows in (slice(40, 340), slice(0, 128), slice(7, 71)):  # the last are few
            assert torch.equal(ops.gathered_linear(linear.x[rows], linear.weight), alone[rows])


@pytest.mark.parametrize("isa", isas())
def test_more_rows_than_are_packed_at_once(isa: str) -> None:
    linear = Linear(1100, 16416, 2048, torch.bfloat16)  # 32 MiB are 768 rows
    columns = [0, 1, 1023, 2047]
    with use_isa(isa):
        out = ops.gathered_linear(linear.x, linear.weight)
    weight = linear.weight[columns]
    want = linear.x.double() @ weight.double().T
    assert_close(out[:, columns], want, linear.x @ weight.T)


def test_more_indices_than_rows() -> None:
    Linear(3, 64, 96, torch.float32).expect_right([2, 1, 0, 2, 2, 1])


@pytest.mark.parametrize("norm", [False, True])
def test_views(norm: bool) -> None:
    linear = Linear(9, 64, 96, torch.bfloat16)
    want = linear.expect_right(norm=norm)
    for name in ("x", "weight"):
        tensor = getattr(linear, name)
        setattr(linear, name, torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]])
    assert torch.equal(linear.expect_right(norm=norm), want)


def test_errors() -> None:
    linear = Linear(6, 16, 24, torch.float32)
    one = torch.tensor([1], dtype=torch.int32)
    good = {"x": linear.x, "weight": linear.weight}
    for change, message in [
        ({"x": linear.x[0]}, "x must be float32, bfloat16 or float16 [num_tokens, in_dim], got"),
        ({"weight": linear.weight.half()}, "weight must be float32 (like x) [out_dim, in_dim = "
         "16], got float16 [24, 16]"),
        ({"bias": linear.norm}, "bias must be float32 (like x) [out_dim = 24], got float32 [16]"),
        ({"norm_weight": linear.bias}, "norm_weight must be float32 (like x) [in_dim = 16], got"),
        ({"indices": one}, "indices and count must be given together"),
        ({"indices": one.long(), "count": one}, "indices must be int32 [max_rows], got int64 [1]"),
        ({"indices": one, "count": 2 * one}, "count must be within indices, got 2 of 1"),
        ({"norm_weight": linear.norm, "eps": -1.0}, "eps must be a finite number >= 0, got -1"),
        ({"indices": 6 * one, "count": one}, "indices must be below num_tokens = 6, got 6 at 0"),
    ]:  # fmt: skip
        with raises("gathered_linear: " + message):
            ops.gathered_linear(**{**good, **change})
