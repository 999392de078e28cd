"""rope_realign and its in-page form: one rotation by the difference, one rounding."""

from __future__ import annotations

import pytest
import torch
from paged_case import DTYPES, isas, raises, use_isa
from reference.attention import rotate
from torch import Tensor

from redknot import ops


def frequencies(rotary_dim: int) -> Tensor:
    return 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)


def assert_rounded_once(out: Tensor, exact: Tensor) -> None:
    """Within half a unit in the last place of the dtype, and what fp32 products lose."""
    eps = torch.finfo(out.dtype).eps
    fp32 = 4e-7 * exact.abs().amax(-1, keepdim=True)
    assert ((out.double() - exact).abs() <= 0.505 * eps * exact.abs() + fp32).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (40, 40), (128, 32), (24, 6)])
def test_realign(isa: str, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    k = torch.randn(7, 3, head_dim).to(dtype)
    with use_isa(isa):
        out = ops.rope_realign(k, 1234, frequencies(rotary_dim))
        back = ops.rope_realign(k, -77, frequencies(rotary_dim))
    assert_rounded_once(out, rotate(k.double(), 1234, frequencies(rotary_dim)))
    assert_rounded_once(back, rotate(k.double(), -77, frequencies(rotary_dim)))
    assert torch.equal(out[..., rotary_dim:], k[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_offset_per_token(dtype: torch.dtype) -> None:
    k = torch.randn(5, 2, 32).to(dtype)
    offsets = torch.tensor([0, 3, -9, 100000, 3], dtype=torch.int32)
    out = ops.rope_realign(k, offsets, frequencies(32))
    for t, offset in enumerate(offsets.tolist()):
        assert torch.equal(out[t], ops.rope_realign(k, offset, frequencies(32))[t])
    assert torch.equal(out[0], k[0])


def test_interleaved_pairs() -> None:
    k = torch.randn(3, 2, 16, dtype=torch.float64)
    apart = torch.cat([k[..., 0::2], k[..., 1::2]], -1)
    turned = rotate(apart, 11, frequencies(16))
    want = torch.stack([turned[..., :8], turned[..., 8:]], -1).flatten(-2)
    out = ops.rope_realign(k.float(), 11, frequencies(16), interleaved=True)
    torch.testing.assert_close(out, want.float())


def test_views_and_in_place() -> None:
    qkv = torch.randn(6, 4, 32, dtype=torch.bfloat16)
    want = ops.rope_realign(qkv[:, 1:3].contiguous(), 5, frequencies(32))
    others = qkv[:, ::3].clone()
    keys = qkv[:, 1:3]
    assert ops.rope_realign(keys, 5, frequencies(32), out=keys) is keys
    assert torch.equal(keys, want) and torch.equal(qkv[:, ::3], others)


def test_realign_is_a_step_of_the_model() -> None:
    """Keys rotated at local positions and moved equal keys rotated at their true positions."""
    k = torch.randn(20, 1, 64)
    local = ops.rope_realign(k, torch.arange(20, dtype=torch.int32), frequencies(64))
    true = ops.rope_realign(k, torch.arange(500, 520, dtype=torch.int32), frequencies(64))
    moved = ops.rope_realign(local, 500, frequencies(64))
    torch.testing.assert_close(moved, true, rtol=0, atol=2e-4)  # angles of 500 in fp32


@pytest.mark.parametrize("dtype", DTYPES)
def test_realign_pages(dtype: torch.dtype) -> None:
    pages = torch.randn(5, 2, 8, 32).to(dtype)[:, 1]
    want = pages.clone()
    refs = torch.tensor([[3, 0, 8, 40], [0, 8, 5, -2], [1, 13, 8, 0], [4, 0, 0, 7]]).int()
    for page, _, valid, offset in refs.tolist():
        want[page, :valid] = ops.rope_realign(
            pages[page, :valid].unsqueeze(1).contiguous(), offset, frequencies(32)
        ).squeeze(1)
    ops.rope_realign_pages(pages, refs, frequencies(32))
    assert torch.equal(pages, want)


def test_nothing_to_do() -> None:
    assert ops.rope_realign(torch.empty(0, 2, 8), 3, frequencies(8)).shape == (0, 2, 8)
    ops.rope_realign_pages(torch.empty(2, 4, 8), torch.empty(0, 4).int(), frequencies(8))


def test_errors() -> None:
    k, inv_freq = torch.randn(3, 2, 16), frequencies(16)
    for call, message in [
        (lambda: ops.rope_realign(k[0], 1, inv_freq),
         "rope_realign: k must be float32, bfloat16 or float16 [num_tokens, num_heads, head_dim], "
         "got float32 [2, 16]"),
        (lambda: ops.rope_realign(k[..., :12].contiguous(), 1, inv_freq),
         "rope_realign: head_dim must be a positive multiple of 8, got k float32 [3, 2, 12]"),
        (lambda: ops.rope_realign(k, 1, frequencies(18)),
         "rope_realign: inv_freq must have at most head_dim / 2 = 8 elements, got float32 [9]"),
        (lambda: ops.rope_realign(k, 1, inv_freq.double()),
         "rope_realign: inv_freq must be float32 [rotary_dim / 2], got float64 [8]"),
        (lambda: ops.rope_realign(k, 2**31, inv_freq),
         "rope_realign: offset must fit int32, got 2147483648"),
        (lambda: ops.rope_realign(k, torch.arange(3), inv_freq),
         "rope_realign: offsets must be int32 [num_tokens = 3], got int64 [3]"),
        (lambda: ops.rope_realign(k, 1, inv_freq, out=k.half()),
         "rope_realign: out must be float32 (like k)"),
        (lambda: ops.rope_realign(k[:2], 1, inv_freq, out=k[:2].mT.reshape(2, 2, 16)[:1]),
         "rope_realign: out must be float32 (like k) [num_tokens = 2"),
        (lambda: ops.rope_realign(k[::2], 1, inv_freq, out=k[:2]),
         "rope_realign: out must be k itself or not overlap it"),
        (lambda: ops.rope_realign_pages(k, torch.zeros(1, 3).int(), inv_freq),
         "rope_realign_pages: page_refs must be int32 [num_refs, 4], got int32 [1, 3]"),
        (lambda: ops.rope_realign_pages(k, torch.tensor([[3, 0, 1, 1]]).int(), inv_freq),
         "rope_realign_pages: page_refs[0] must name a page below num_pages = 3, got 3"),
        (lambda: ops.rope_realign_pages(k, torch.tensor([[1, 0, 3, 1]]).int(), inv_freq),
         "rope_realign_pages: page_refs[0] must have 0 to page_size = 2 valid slots, got 3"),
        (lambda: ops.rope_realign_pages(k, torch.tensor([[1, 0, 2, 1]] * 2).int(), inv_freq),
         "rope_realign_pages: page_refs must name a page once, got page 1 again at 1"),
    ]:  # fmt: skip
        with raises(message):
            call()


def inside(buffer: Tensor, first: int, tokens: int = 6) -> Tensor:
    """Keys [tokens, 2, 16] of a fused projection [.., 5, 16], from an element on."""
    return buffer.as_strided((tokens, 2, 16), (80, 16, 1), first)


@pytest.mark.parametrize(
    ("first", "overlaps"),
    # Behind one another within a row, the next token's, one element on, one head on, behind all.
    [(32, False), (80, True), (1, True), (16, True), (480, False)],
)
def test_out_may_not_overlap_the_keys_unless_it_is_them(first: int, overlaps: bool) -> None:
    buffer, inv_freq = torch.randn(1000), torch.ones(8)
    k, out = inside(buffer, 0), inside(buffer, first)
    want = ops.rope_realign(k, 3, inv_freq)
    before = buffer.clone()
    if overlaps:
        with pytest.raises(RuntimeError, match="rope_realign: out must be k itself or not"):
            ops.rope_realign(k, 3, inv_freq, out=out)
        assert torch.equal(buffer, before)
    else:
        assert torch.equal(ops.rope_realign(k, 3, inv_freq, out=out), want)
    with pytest.raises(RuntimeError, match="out must be k itself or not"):  # other strides
        ops.rope_realign(k, 3, inv_freq, out=buffer[:192].view(6, 2, 16))
