"""write_pages and copy_pages: what they write, what they leave alone, what they refuse."""

from __future__ import annotations

import pytest
import torch
from paged_case import DTYPES, raises
from torch import Tensor

from redknot import ops


def pool(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6, 4, 16, generator=rng).to(dtype) for _ in range(2))
    return k, v


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_pages(dtype: torch.dtype) -> None:
    k_cache, v_cache = pool(dtype)
    k, v = torch.randn(5, 2, 16).to(dtype), torch.randn(5, 2, 16).to(dtype)
    slots = torch.tensor([[0, 23], [5, -1], [-1, -1], [7, 12], [22, 1]])
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for token, head in (slots >= 0).nonzero().tolist():
        page, slot = divmod(int(slots[token, head]), 4)
        want_k[page, slot], want_v[page, slot] = k[token, head], v[token, head]
    ops.write_pages(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)


def test_write_pages_takes_views() -> None:
    kv = torch.zeros(6, 4, 32)
    qkv = torch.randn(5, 4, 16)
    slots = torch.arange(20).reshape(5, 4)
    ops.write_pages(qkv[:, :2], qkv[:, 2:], kv[..., :16], kv[..., 16:], slots[:, 1:3])
    for token, head in torch.cartesian_prod(torch.arange(5), torch.arange(2)).tolist():
        page, slot = divmod(int(slots[token, 1 + head]), 4)
        assert torch.equal(kv[page, slot], torch.cat([qkv[token, head], qkv[token, 2 + head]]))
    assert (kv.flatten(0, 1)[0] == 0).all() and (kv.flatten(0, 1)[20:] == 0).all()


def test_write_pages_of_many_tokens() -> None:
    k_cache, v_cache = torch.zeros(64, 64, 64), torch.zeros(64, 64, 64)
    k, v = torch.randn(2048, 2, 64), torch.randn(2048, 2, 64)
    slots = torch.randperm(64 * 64).reshape(2048, 2)
    ops.write_pages(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.flatten(0, 1)[slots], k)
    assert torch.equal(v_cache.flatten(0, 1)[slots], v)


@pytest.mark.parametrize("count", [0, 3])
def test_copy_pages(count: int) -> None:
    k_cache, v_cache = pool()
    copies = torch.tensor([[0, 3], [0, 5], [2, 1]], dtype=torch.int32)[:count]
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for source, destination in copies.tolist():
        want_k[destination], want_v[destination] = k_cache[source], v_cache[source]
    ops.copy_pages(k_cache, v_cache, copies)
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)


def test_copy_pages_of_one_tensor() -> None:
    kv = torch.randn(6, 2, 4, 16)
    want = kv.clone()
    want[4] = kv[1]
    ops.copy_pages(kv[:, 0], kv[:, 1], torch.tensor([[1, 4]], dtype=torch.int32))
    assert torch.equal(kv, want)


def test_write_pages_errors() -> None:
    k_cache, v_cache = pool()
    k, slots = torch.randn(3, 2, 16), torch.arange(6).reshape(3, 2)
    for args, message in [
        ((k, k, k_cache, v_cache, slots.int()),
         "slots must be int64 [num_tokens, num_kv_heads], got int32 [3, 2]"),
        ((k[:2], k, k_cache, v_cache, slots),
         "k must be float32 (like k_cache) [num_tokens = 3, num_kv_heads = 2, head_dim = 16], got "
         "float32 [2, 2, 16]"),
        ((k, k.half(), k_cache, v_cache, slots), "v must be float32 (like k_cache)"),
        ((k, k, k_cache, v_cache[:, :2], slots), "v_cache must be float32 (like k_cache)"),
        ((k, k, k_cache, v_cache, slots + 19),
         "slots must be -1 or below num_pages * page_size = 24, got 24 at [2, 1]"),
        ((k, k, k_cache, v_cache, slots - 2), "slots must be -1 or below"),
        ((k, k, k_cache[:1].expand(6, 4, 16), v_cache, slots),
         "k_cache is written to, so it must not be an expanded view: stride 0 is 0"),
    ]:  # fmt: skip
        with raises("write_pages: " + message):
            ops.write_pages(*args)


def test_copy_pages_errors() -> None:
    k_cache, v_cache = pool()
    for copies, message in [
        (torch.zeros(2, 2), "copies must be int32 [num_copies, 2], got float32 [2, 2]"),
        (torch.tensor([[0, 6]]).int(), "copies must name pages below num_pages = 6, got 6 at 0"),
        (torch.tensor([[-1, 2]]).int(), "copies must name pages below num_pages = 6, got -1 at 0"),
        (torch.tensor([[0, 2], [1, 2]]).int(),
         "copies must name a destination once, got page 2 again at 1"),
        (torch.tensor([[0, 2], [2, 3]]).int(),
         "copies must not read a page that they write, got page 2 at 1"),
    ]:  # fmt: skip
        with raises("copy_pages: " + message):
            ops.copy_pages(k_cache, v_cache, copies)


def test_keys_and_values_have_pages_of_their_own() -> None:
    pool = torch.zeros(4, 2, 8, 16)
    k, slots = torch.randn(3, 2, 16), torch.arange(6).reshape(3, 2)
    ops.write_pages(k, 2 * k, pool[:, 0], pool[:, 1], slots)  # side by side in one tensor
    assert torch.equal(pool[0, 1], 2 * pool[0, 0]) and pool[0, 0, :6].ne(0).all()
    for v_cache in (pool[:, 0], pool.flatten(0, 1)[:4]):
        with pytest.raises(RuntimeError, match="write_pages: v_cache must not overlap k_cache"):
            ops.write_pages(k, k, pool[:, 0], v_cache, slots)
    with pytest.raises(RuntimeError, match="copy_pages: v_cache must not overlap k_cache"):
        ops.copy_pages(pool[:, 0], pool[:, 0], torch.tensor([[0, 1]], dtype=torch.int32))
