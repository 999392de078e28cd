"""The CUDA kernels against plain torch, on a GPU; `-k small` is the part for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redknot import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(not ops.has_cuda_kernels(), reason="redknot was built without CUDA"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [pytest.param(3, 2, id="small"), pytest.param(1000, 9, id="large")]
PAGE_SIZE = 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def pool_of(
    num_pages: int, head_dim: int, dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor]:
    """K and V caches: two tensors, views of one, or views that start off a 16-byte boundary."""
    if layout == "apart":
        return tuple(random(num_pages, PAGE_SIZE, head_dim, dtype=dtype) for _ in range(2))
    odd = 1 if layout == "unaligned" else 0
    both = random(num_pages, PAGE_SIZE, 2 * head_dim + odd, dtype=dtype)
    return both[..., odd : odd + head_dim], both[..., odd + head_dim :]


LAYOUTS = ["apart", "fused", "unaligned"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [8, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_kv_heads"), SIZES)
def test_write_pages(
    num_tokens: int, num_kv_heads: int, dtype: torch.dtype, head_dim: int, layout: str
) -> None:
    num_pages = 2 * num_tokens * num_kv_heads // PAGE_SIZE + 2
    k_cache, v_cache = pool_of(num_pages, head_dim, dtype, layout)
    # Views of one projection: the token stride exceeds the heads.
    fused = random(num_tokens, 2 * num_kv_heads, head_dim, dtype=dtype)
    k, v = fused[:, :num_kv_heads], fused[:, num_kv_heads:]
    slots = torch.randperm(num_pages * PAGE_SIZE, device="cuda")[: num_tokens * num_kv_heads]
    slots = slots.view(num_tokens, num_kv_heads)
    slots[::3] = -1
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    written = slots >= 0
    page, slot = slots[written] // PAGE_SIZE, slots[written] % PAGE_SIZE
    expected_k[page, slot], expected_v[page, slot] = k[written], v[written]

    ops.write_pages(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_copies", [pytest.param(2, id="small"), pytest.param(500, id="large")])
def test_copy_pages(num_copies: int, dtype: torch.dtype, layout: str) -> None:
    k_cache, v_cache = pool_of(2 * num_copies + 1, 64, dtype, layout)
    pages = torch.randperm(2 * num_copies + 1, device="cuda", dtype=torch.int32)
    copies = pages[: 2 * num_copies].view(-1, 2).contiguous()
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    source, destination = copies.long().unbind(1)
    expected_k[destination], expected_v[destination] = k_cache[source], v_cache[source]

    ops.copy_pages(k_cache, v_cache, copies)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def rotated(k: Tensor, offsets: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """R(offsets[t]) k[t] in fp64, of the angles as fp32 has them."""
    half = len(inv_freq)
    angles = (offsets.float()[:, None, None] * inv_freq).double()
    x = k.double()
    turning = x[..., : 2 * half]
    a, b = (
        (turning[..., 0::2], turning[..., 1::2])
        if interleaved
        else (turning[..., :half], turning[..., half:])
    )
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([joined, x[..., 2 * half :]], -1)


# One rounding to the dtype, beside a few of fp32 on values of a few units.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def frequencies(rotary_dim: int) -> Tensor:
    return 10000.0 ** -(torch.arange(0, rotary_dim, 2, device="cuda") / rotary_dim)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (128, 128), (96, 40), (64, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_heads"), SIZES)
def test_rope_realign(
    num_tokens: int,
    num_heads: int,
    dtype: torch.dtype,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    k = random(num_tokens, 2 * num_heads, head_dim, dtype=dtype)[:, num_heads:]
    inv_freq = frequencies(rotary_dim)
    offsets = torch.randint(-200000, 200000, (num_tokens,), dtype=torch.int32, device="cuda")
    offsets[0] = 0
    expected = rotated(k, offsets, inv_freq, interleaved)
    assert_close(ops.rope_realign(k, offsets, inv_freq, interleaved), expected)

    one = torch.full_like(offsets, 1234)
    expected = rotated(k, one, inv_freq, interleaved)
    assert_close(ops.rope_realign(k, 1234, inv_freq, interleaved), expected)
    ops.rope_realign(k, 1234, inv_freq, interleaved, out=k)
    assert_close(k, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_refs", [pytest.param(5, id="small"), pytest.param(400, id="large")])
def test_rope_realign_pages(num_refs: int, dtype: torch.dtype, layout: str) -> None:
    k_cache, _ = pool_of(num_refs + 3, 64, dtype, layout)
    inv_freq = frequencies(64)
    refs = torch.zeros(num_refs, 4, dtype=torch.int32, device="cuda")
    refs[:, 0] = torch.randperm(num_refs + 3, device="cuda")[:num_refs]
    refs[:, 2] = torch.randint(0, PAGE_SIZE + 1, (num_refs,), device="cuda")
    refs[:, 3] = torch.randint(-5000, 5000, (num_refs,), device="cuda")
    refs[0, 3] = 0
    expected = k_cache.double()
    for page, _, num_valid, offset in refs.tolist():
        if offset:
            offsets = torch.full((num_valid,), offset, device="cuda")
            keys = k_cache[page, :num_valid, None]
            expected[page, :num_valid] = rotated(keys, offsets, inv_freq, False)[:, 0]

    ops.rope_realign_pages(k_cache, refs, inv_freq)
    assert_close(k_cache, expected)


def test_small_empty_calls_do_nothing() -> None:
    k_cache, v_cache = pool_of(2, 64, torch.float32, "apart")
    before = k_cache.clone()
    none = torch.empty(0, 2, 64, device="cuda")
    ops.write_pages(
        none, none, k_cache, v_cache, torch.empty(0, 2, dtype=torch.int64, device="cuda")
    )
    ops.copy_pages(k_cache, v_cache, torch.empty(0, 2, dtype=torch.int32, device="cuda"))
    assert ops.rope_realign(none, 3, frequencies(64)).shape == none.shape
    assert torch.equal(k_cache, before)


def test_small_work_is_queued_on_the_current_stream() -> None:
    k = random(64, 2, 64, dtype=torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Long enough that a launch on another stream would read k before it is doubled.
        torch.cuda._sleep(20_000_000)
        k.mul_(2)
        moved = ops.rope_realign(k, 5, frequencies(64))
    stream.synchronize()
    offsets = torch.full((64,), 5, device="cuda")
    assert_close(moved, rotated(k, offsets, frequencies(64), False))


def test_small_arguments_of_two_devices_are_refused() -> None:
    k_cache, v_cache = pool_of(2, 64, torch.float32, "apart")
    copies = torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"copy_pages: copies must be on cuda:0"):
        ops.copy_pages(k_cache, v_cache, copies)
