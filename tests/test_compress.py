"""Compressing a cache that is already there: what goes, what stays, what is refused."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import NUM_LAYERS, assert_close, prompt, reference_rules, tiny_model
from test_seg_paged_cache import HEAD_DIM, HEADS, NUM_HEADS, PAGE, held_bytes, poisoned_pool

from redknot import HeadMap, HeadMapError, attach
from redknot.models.seg_paged_cache import SegPagedCache

pytestmark = pytest.mark.transformers
EXACT = HeadMap.all_global(NUM_LAYERS, NUM_HEADS)


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    with attach(model, EXACT, page_size=PAGE):
        yield model


def decode(model, cache, tokens):
    steps = [model(t[:, None], past_key_values=cache).logits[:, 0] for t in tokens.unbind(1)]
    return torch.stack(steps, dim=1)


@torch.no_grad()
def test_a_full_cache_shrinks_to_the_map_and_decodes_under_it(model):
    pool, ids, more = poisoned_pool(), prompt(2, 90), prompt(2, 20, seed=5)
    cache = SegPagedCache(model.config, EXACT, pool=pool)
    model(ids, past_key_values=cache)
    full = cache.kv_bytes()
    freed = cache.compress(HEADS)
    assert full - freed == cache.kv_bytes() == 2 * held_bytes(90)
    logits = decode(model, cache, more)
    whole = torch.cat([ids, more], dim=1)
    with reference_rules(model, HEADS.windows.tolist(), HEADS.sinks.tolist(), since=90):
        expected = model(whole, use_cache=False).logits[:, 90:]
    assert_close(logits, expected)
    cache._batch.expire()
    assert cache.kv_bytes() == 2 * held_bytes(110)


@torch.no_grad()
def test_what_was_dropped_is_never_given_back_in_silence(model):
    cache = SegPagedCache(model.config, EXACT, page_size=PAGE)
    model(prompt(1, 90), past_key_values=cache)
    cache.compress(HEADS)
    held = cache.kv_bytes()
    wider = HeadMap(HEADS.classes, window=30, sink=9)
    words = "layer 0, head 0 has expired tokens that window 30, sink 9 would see.*prefill again"
    with pytest.raises(HeadMapError, match=words):
        cache.compress(wider)
    with pytest.raises(HeadMapError, match=r"layer 0, head 0 .* window -1"):
        cache.compress(EXACT)
    with pytest.raises(HeadMapError, match="the model has"):
        cache.compress(HeadMap.all_global(NUM_LAYERS, 4))
    assert cache.kv_bytes() == held and cache.heads is HEADS
    narrower = HeadMap.all_local(NUM_LAYERS, NUM_HEADS, window=1, sink=0)
    assert cache.compress(narrower) == held - cache.kv_bytes() > 0


@torch.no_grad()
def test_a_cache_that_holds_everything_takes_any_map(model):
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE)
    ids = prompt(1, 5)
    model(ids, past_key_values=cache)
    assert cache.compress(EXACT) == 0  # nothing has left a window yet
    more = prompt(1, 60, seed=3)
    logits = decode(model, cache, more)
    expected = model(torch.cat([ids, more], 1), past_key_values=None).logits[:, 5:]
    assert_close(logits, expected)


def test_the_published_operating_point():
    heads = HeadMap.prefix_compression(4, 2)
    assert heads.is_global.tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    assert (heads.windows[:2] == 4096).all() and (heads.sinks[:2] == 128).all()
    figures = {"head_dim": HEAD_DIM, "bytes_per_element": 2, "page_size": 64}
    saved = [1 - heads.kv_bytes(n, **figures) / heads.kv_bytes_full(n, **figures)
             for n in (8192, 16384, 32768)]  # fmt: skip
    assert saved == pytest.approx([0.24, 0.37, 0.43], abs=0.01)  # published: 24-44 % at 8-32K
    one = HeadMap.prefix_compression(4, 2, layers=[3], window=64, sink=1)
    assert one.is_global.tolist() == [[True] * 2] * 3 + [[False] * 2]
    with pytest.raises(HeadMapError, match="layer 4 is not one of the model's 4 layers"):
        HeadMap.prefix_compression(4, 2, layers=[4])
