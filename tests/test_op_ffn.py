"""gathered_ffn: the listed tokens get the FFN of a Llama layer, all others keep their bits."""

from __future__ import annotations

import pytest
import torch
from paged_case import DTYPES, assert_close, isas, raises, use_isa, use_threads
from reference.selection import gated_ffn
from torch import Tensor

from redknot import ops

EPS = 1e-5


class Ffn:
    """Weights and residual stream of one layer."""

    def __init__(
        self, tokens: int, hidden: int, ffn: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        rng = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=rng) * shape[-1] ** -0.5).to(device, dtype)

        self.residual = torch.randn(tokens, hidden, generator=rng).to(device, dtype)
        self.norm = (1 + torch.randn(hidden, generator=rng) / 8).to(device, dtype)
        self.gate, self.up, self.down = randn(ffn, hidden), randn(ffn, hidden), randn(hidden, ffn)

    def exact(self, dtype: torch.dtype, activation: str = "silu") -> Tensor:
        x, *weights = (
            t.to(dtype) for t in (self.residual, self.norm, self.gate, self.up, self.down)
        )
        return x + gated_ffn(x, weights[0], EPS, *weights[1:], activation)

    def run(self, rows: list[int], packed: bool = True, activation: str = "silu") -> Tensor:
        out = self.residual.clone()
        indices = torch.full((len(out),), -1, dtype=torch.int32)
        indices[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        indices = indices.to(out.device)
        count = torch.tensor([len(rows)], dtype=torch.int32, device=out.device)
        gate = torch.cat([self.gate, self.up]) if packed else self.gate
        up = None if packed else self.up
        ops.gathered_ffn(out, self.norm, EPS, gate, self.down, indices, count, activation, w_up=up)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("packed", [True, False])
def test_selected_tokens(isa: str, dtype: torch.dtype, packed: bool) -> None:
    ffn = Ffn(40, 72, 100, dtype)
    rows = [0, 3, 4, 17, 38]
    with use_isa(isa):
        out = ffn.run(rows, packed)
    assert_close(out[rows], ffn.exact(torch.float64)[rows], ffn.exact(dtype)[rows])
    others = [t for t in range(40) if t not in rows]
    assert torch.equal(out[others], ffn.residual[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_gelu(isa: str, dtype: torch.dtype) -> None:
    ffn = Ffn(20, 72, 100, dtype)
    ffn.gate *= 4  # far enough out that the curve matters
    rows = list(range(3, 17))
    with use_isa(isa):
        out = ffn.run(rows, activation="gelu_tanh")
    exact = ffn.exact(torch.float64, "gelu_tanh")
    assert_close(out[rows], exact[rows], ffn.exact(dtype, "gelu_tanh")[rows])
    assert (out[rows] - ffn.run(rows)[rows]).abs().max() > 0.1  # not the default's


@pytest.mark.parametrize("rows", [[], [7], list(range(40))])
def test_none_one_and_all(rows: list[int]) -> None:
    ffn = Ffn(40, 64, 96, torch.float32)
    want = ffn.residual.clone()
    want[rows] = ffn.exact(torch.float64)[rows].float()
    torch.testing.assert_close(ffn.run(rows), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_few_rows(isa: str, dtype: torch.dtype) -> None:
    # Every number of rows per pass and of tiles, full and not; 65 rows are the library's.
    ffn = Ffn(65, 64, 96, dtype)
    exact, peer = ffn.exact(torch.float64), ffn.exact(dtype)
    with use_isa(isa):
        for count in (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 32, 33, 48, 63, 64, 65):
            rows = list(range(65 - count, 65))
            out = ffn.run(rows, packed=count % 2 == 0)
            assert_close(out[rows], exact[rows], peer[rows])
            assert torch.equal(out[: 65 - count], ffn.residual[: 65 - count])


@pytest.mark.parametrize("isa", isas())
def test_few_rows_do_not_depend_on_threads_or_on_each_other(isa: str) -> None:
    ffn = Ffn(64, 64, 96, torch.bfloat16)
    with use_isa(isa):
        with use_threads(1):
            alone = ffn.run(list(range(64)))
        with use_threads(2):
            assert torch.equal(ffn.run(list(range(64))), alone)
        assert torch.equal(ffn.run(list(range(48)))[:48], alone[:48])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_many_rows(isa: str, packed: bool, activation: str) -> None:
    ffn = Ffn(300, 64, 2080, torch.bfloat16)
    rows = list(range(290))
    with use_isa(isa):
        out = ffn.run(rows, packed, activation)
    exact, peer = ffn.exact(torch.float64, activation), ffn.exact(torch.bfloat16, activation)
    assert_close(out[rows], exact[rows], peer[rows])


@pytest.mark.parametrize("isa", [isa for isa in isas() if isa == "amx"])
def test_many_rows_do_not_depend_on_threads_or_on_each_other(isa: str) -> None:
    ffn = Ffn(300, 1024, 1056, torch.bfloat16)
    with use_isa(isa):
        with use_threads(1):
            alone = ffn.run(list(range(300)))
        for threads in (2, 3):
            with use_threads(threads):
                assert torch.equal(ffn.run(list(range(300)), packed=False), alone)
        for count in (250, 128, 64, 7):  # the last two are few
            assert torch.equal(ffn.run(list(range(count)))[:count], alone[:count])


def test_weights_may_be_views() -> None:
    ffn = Ffn(8, 64, 96, torch.float32)
    want = ffn.run([1, 2], packed=False)
    for name in ("gate", "up", "down"):
        weight = getattr(ffn, name)
        setattr(ffn, name, torch.cat([weight, weight], dim=1)[:, : weight.shape[1]])
    assert torch.equal(ffn.run([1, 2], packed=False), want)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [2048, 2049, 4500])
def test_more_rows_than_one_pass_takes(rows: int, packed: bool) -> None:
    ffn = Ffn(rows, 16, 24, torch.float32)
    out = ffn.run(list(range(rows)), packed)
    torch.testing.assert_close(out, ffn.exact(torch.float64).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_rms_norm(isa: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(9, 2, 100, generator=rng).to(dtype)
    x, weight = wide[:, 1], torch.randn(100, generator=rng).to(dtype)  # strided rows

    def norm(as_dtype: torch.dtype) -> Tensor:
        wide_x = x.float() if as_dtype is dtype else x.to(as_dtype)
        scaled = wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + EPS)
        return scaled.to(as_dtype) * weight.to(as_dtype)

    with use_isa(isa):
        out = ops.rms_norm(x, weight, EPS)
    assert out.is_contiguous()
    assert_close(out, norm(torch.float64), norm(dtype))


def test_rms_norm_errors() -> None:
    x = torch.randn(3, 16)
    for args, message in [
        ((x[0], x[0]), "x must be float32, bfloat16 or float16 [num_rows, hidden_dim], got "
         "float32 [16]"),
        ((x, x[0, :8]), "weight must be float32 (like x) [hidden_dim = 16], got float32 [8]"),
    ]:  # fmt: skip
        with raises("rms_norm: " + message):
            ops.rms_norm(*args, EPS)
    for eps, got in [(-1e-6, "-1e-06"), (float("nan"), "nan"), (float("inf"), "inf")]:
        with raises(f"rms_norm: eps must be a finite number >= 0, got {got}"):
            ops.rms_norm(x, x[0], eps)


def test_large_activations_do_not_overflow() -> None:
    ffn = Ffn(4, 32, 48, torch.float32)
    ffn.gate *= 1000
    assert ffn.run([0, 1, 2, 3]).isfinite().all()
    torch.testing.assert_close(ffn.run([0, 1, 2, 3]), ffn.exact(torch.float64).float(), rtol=1e-4,
                               atol=1e-3)  # fmt: skip


def test_strided_residual() -> None:
    ffn = Ffn(12, 32, 48, torch.float32)
    want = ffn.run([2, 5])
    wide = torch.zeros(12, 64)
    wide[:, :32] = ffn.residual
    view = wide[:, :32]
    indices, count = torch.tensor([2, 5], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    ops.gathered_ffn(view, ffn.norm, EPS, torch.cat([ffn.gate, ffn.up]), ffn.down, indices, count)
    assert torch.equal(view, want) and (wide[:, 32:] == 0).all()


def test_errors() -> None:
    f = Ffn(6, 16, 24, torch.float32)
    packed = torch.cat([f.gate, f.up])
    good = {"residual": f.residual, "norm_weight": f.norm, "eps": EPS, "w_gate_up": packed,
            "w_down": f.down, "indices": torch.tensor([1, 2]).int(),
            "count": torch.tensor([2]).int()}  # fmt: skip
    for change, message in [
        ({"activation": "gelu"}, 'activation must be "silu" or "gelu_tanh", got "gelu"'),
        ({"residual": f.residual.long()}, "residual must be float32, bfloat16 or float16 "
         "[num_tokens, hidden_dim], got int64 [6, 16]"),
        ({"norm_weight": f.norm[1:]}, "norm_weight must be float32 (like residual) [hidden_dim = "
         "16], got float32 [15]"),
        ({"w_down": f.down.half()}, "w_down must be float32 (like residual) [hidden_dim = 16, "
         "ffn_dim], got float16 [16, 24]"),
        ({"w_gate_up": f.gate}, "w_gate_up must be float32 (like residual) [2 * ffn_dim = 48, "
         "hidden_dim = 16], got float32 [24, 16]"),
        ({"w_up": f.up}, "w_gate_up must be float32 (like residual) [ffn_dim = 24, hidden_dim = "
         "16], got float32 [48, 16]"),
        ({"w_gate_up": f.gate, "w_up": packed}, "w_up must be float32 (like residual) [ffn_dim = "
         "24, hidden_dim = 16], got float32 [48, 16]"),
        ({"indices": torch.tensor([1, 2])}, "indices must be int32 [max_rows], got int64 [2]"),
        ({"count": torch.tensor(2).int()}, "count must be int32 [1], got int32 []"),
        ({"count": torch.tensor([3]).int()}, "count must be within indices, got 3 of 2"),
        ({"indices": torch.tensor([1, 6]).int()},
         "indices must be below num_tokens = 6, got 6 at 1"),
        ({"indices": torch.tensor([1, -1]).int()},
         "indices must be below num_tokens = 6, got -1 at 1"),
        ({"indices": torch.tensor([1, 1]).int()}, "indices must be unique, got 1 again at 1"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1"),
    ]:  # fmt: skip
        with raises("gathered_ffn: " + message):
            ops.gathered_ffn(**{**good, **change})
