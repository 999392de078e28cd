"""SegPagedCache: what it holds, frees, shares, takes back and refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from hf_tiny import (
    NUM_LAYERS,
    assert_close,
    assert_greedy,
    greedy,
    native_rules,
    prompt,
    tiny_model,
)

from redknot.cache.pool import KVPool, bytes_per_page
from redknot.cache.pool_options import PoolOptions
from redknot.errors import BudgetError, HeadMapError, InputError
from redknot.heads import HeadMap
from redknot.models.attach import attach
from redknot.models.seg_paged_cache import SegPagedCache

pytestmark = pytest.mark.transformers

HEAD_DIM, NUM_HEADS, PAGE = 32, 2, 8
HEADS = HeadMap(
    [["local", "global"], ["local", "local"], ["local", "local"]],
    window=[[9, 1], [16, 20], [5, 24]],
    sink=[[4, 0], [0, 3], [9, 4]],
)


def poisoned_pool(num_pages=600):
    """Freed pages turn into NaN, so that reading one shows."""
    pool = KVPool(
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        num_pages=num_pages,
        page_size=PAGE,
        poison_freed_pages=True,
    )
    pool.k_cache.fill_(torch.nan)
    pool.v_cache.fill_(torch.nan)
    return pool


def held_bytes(length, heads=HEADS):
    return heads.kv_bytes(length, head_dim=HEAD_DIM, bytes_per_element=4, page_size=PAGE)


@pytest.fixture
def model():
    model = tiny_model()
    with attach(model, HEADS, page_size=PAGE):
        yield model


@torch.no_grad()
def test_decoding_past_the_window_frees_pages_and_keeps_the_text(model):
    ids = prompt(2, 30)
    pool = poisoned_pool()
    cache = SegPagedCache(model.config, HEADS, pool=pool)
    tokens = greedy(model, ids, 200, past_key_values=cache)
    # All but one head hold a few pages of the 29 that their tokens would take.
    assert cache.get_seq_length() == 229
    stats = cache.stats()
    assert stats["global_pages"] == 2 * 29
    assert stats["local_pages"] <= 2 * (NUM_LAYERS * NUM_HEADS - 1) * 6
    assert stats["pool_free_pages"] == 600 - stats["global_pages"] - stats["local_pages"]
    assert pool.allocator.poisons_freed_pages
    free = set(range(600)) - {
        int(page)
        for layer in range(NUM_LAYERS)
        for page in pool.allocator.rows(list(cache.sessions), layer)[1][:, 0]
    }
    assert pool.k_cache[sorted(free)].isnan().all() and pool.v_cache[sorted(free)].isnan().all()
    assert_greedy(model, tokens, 30, native_rules(HEADS, model))


@pytest.mark.parametrize("length", [1, 8, 23, 64, 97])
@torch.no_grad()
def test_bytes_are_those_the_head_map_foretells(model, length):
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE)
    model(prompt(1, length), past_key_values=cache)
    cache._batch.expire()
    assert cache.kv_bytes() == held_bytes(length)
    cache.reset()
    assert cache.kv_bytes() == 0 and cache.get_seq_length() == 0
    model(prompt(3, 5), past_key_values=cache)  # another batch size after a reset
    assert cache.stats()["sequences"] == 3


@torch.no_grad()
def kept_pages(window, sink, length):
    """Pages of a row that a later token can see some of."""
    pages = range(-(-length // PAGE))
    first_seen = 0 if window < 0 else length - window + 1
    return sum(p * PAGE < sink or min((p + 1) * PAGE, length) > first_seen for p in pages)


def peak_by_layer(length, rows=1):
    """Most pages at once: a layer whole, the layers before it as later tokens see them."""
    windows, sinks = HEADS.rules([None] * NUM_LAYERS)
    kept = [
        sum(kept_pages(w, s, length) for w, s in zip(*layer, strict=True))
        for layer in zip(windows.tolist(), sinks.tolist(), strict=True)
    ]
    whole = NUM_HEADS * -(-length // PAGE)
    return rows * max(sum(kept[:layer]) + whole for layer in range(NUM_LAYERS))


@pytest.fixture
def pages_in_use(monkeypatch):
    """Pages that are held while each layer attends; freed ones are NaN."""
    taken, attend, make = [], KVPool.attend, PoolOptions.make_pool

    def counting(pool, *args, **options):
        taken.append(len(pool.k_cache) - pool.allocator.free_pages())
        return attend(pool, *args, **options)

    def poisoned(options, shape, like, num_pages):
        made = make(options, shape, like, 1)
        return poisoned_pool(num_pages) if made.page_size == PAGE else made

    monkeypatch.setattr(KVPool, "attend", counting)
    monkeypatch.setattr(PoolOptions, "make_pool", poisoned)
    return taken


@pytest.mark.parametrize("rows", [1, 3])
def test_local_heads_of_one_layer_alone_hold_a_whole_prompt(model, pages_in_use, rows):
    ids = torch.cat([prompt(1, 90, seed=number) for number in range(rows)])
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE, max_tokens=96)
    with torch.inference_mode():
        by_layer = model(ids, past_key_values=cache).logits
        assert max(pages_in_use) == peak_by_layer(90, rows)
        assert len(cache.pool.k_cache) < 0.9 * rows * NUM_LAYERS * NUM_HEADS * 12
        assert cache.kv_bytes() == rows * held_bytes(90)
        pages_in_use.clear()
        shared = SegPagedCache(model.config, HEADS, page_size=PAGE, pool=poisoned_pool())
        at_once = model(ids, past_key_values=shared).logits
        assert max(pages_in_use) == rows * NUM_LAYERS * NUM_HEADS * 12 > peak_by_layer(90, rows)
        torch.testing.assert_close(by_layer, at_once, rtol=0, atol=0)
        for token in (7, 8):  # and what was kept is what decoding needs
            step = torch.full((rows, 1), token)
            ours, theirs = (model(step, past_key_values=c).logits for c in (cache, shared))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_prompt_fits_where_its_layers_fit_one_after_the_other(model):
    ids, enough = prompt(1, 90), peak_by_layer(90)
    with torch.inference_mode():
        model(ids, past_key_values=SegPagedCache(
            model.config, HEADS, page_size=PAGE, num_pages=enough))  # fmt: skip
        small = SegPagedCache(model.config, HEADS, page_size=PAGE, num_pages=enough - 1)
        with pytest.raises(BudgetError, match=f"{enough} more pages are needed, {enough - 1} are"):
            model(ids, past_key_values=small)
        assert small.get_seq_length() == 0 and small.kv_bytes() == 0
        model(prompt(1, 20), past_key_values=small)  # it is as before


def test_lengths_are_logical(model):
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE, max_tokens=99)
    assert (cache.get_seq_length(), cache.get_max_length(), cache.get_max_cache_shape()) == (
        (0, 99, 99)
    )
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :11] = 0
    model(prompt(2, 40), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == cache.get_seq_length(2) == 40
    assert cache.get_mask_sizes(3, 1) == (43, 0)
    assert not cache.is_compileable and cache.batch_size == 2 and len(cache) == NUM_LAYERS
    # Pads took no slot.
    allocator = cache.pool.allocator
    assert [allocator.session_length(session) for session in cache.sessions] == [29, 40]
    assert SegPagedCache(model.config, HEADS).get_max_length() == -1


@torch.no_grad()
def test_a_pool_without_a_budget_grows(model):
    ids = prompt(2, 20)
    heads = HeadMap([["local", "global"]] * NUM_LAYERS, window=9)
    cache = SegPagedCache(model.config, heads, page_size=PAGE)
    out = model(ids, past_key_values=cache)
    first_size = cache.stats()["pool_pages"]
    for _ in range(400):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache)
    assert cache.stats()["pool_pages"] > first_size
    assert cache.get_seq_length() == 420
    with_room = SegPagedCache(model.config, heads, page_size=PAGE, max_tokens=500)
    expected = greedy(model, ids, 401, past_key_values=with_room)
    assert with_room.stats()["kv_bytes"] == cache.stats()["kv_bytes"]
    assert torch.equal(out.logits[:, -1].argmax(-1), expected[:, -1])


# --- budgets ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_budget_that_is_too_small_changes_nothing(model):
    ids = prompt(1, 30)
    rows = NUM_LAYERS * NUM_HEADS
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE, num_pages=4 * rows + 1)
    out = model(ids, past_key_values=cache)
    before = cache.stats()
    with pytest.raises(BudgetError, match=r"more pages are needed, \d+ are free") as error:
        model(prompt(1, 200), past_key_values=cache)
    assert "\n" not in str(error.value)
    assert cache.stats() == before and cache.get_seq_length() == 30
    token = out.logits[:, -1:].argmax(-1)
    again = model(token, past_key_values=cache).logits
    other = SegPagedCache(model.config, HEADS)
    assert_close(again, model(torch.cat([ids, token], 1), past_key_values=other).logits[:, -1:])


@torch.no_grad()
def test_budget_in_bytes_and_limit_of_tokens(model):
    page_bytes = bytes_per_page(PAGE, HEAD_DIM, torch.float32)
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE, budget_bytes=100 * page_bytes + 1)
    model(prompt(1, 30), past_key_values=cache)
    assert cache.stats()["pool_pages"] == 100
    tiny = SegPagedCache(model.config, HEADS, page_size=PAGE, budget_bytes=page_bytes - 1)
    with pytest.raises(BudgetError, match="less than one page"):
        model(prompt(1, 30), past_key_values=tiny)
    short = SegPagedCache(model.config, HEADS, max_tokens=20)
    model(prompt(1, 20), past_key_values=short)
    with pytest.raises(
        BudgetError, match="made for at most 20 tokens, but 20 are in it and 1 more"
    ):
        model(prompt(1, 1), past_key_values=short)
    assert short.get_seq_length() == 20


def test_bad_options_are_refused(model):
    for options, message in [
        ({"page_size": 0}, "page_size must be an int of at least 1, got 0"),
        ({"max_tokens": -1}, "max_tokens must be"),
        ({"num_pages": 3, "budget_bytes": 99}, "either num_pages or budget_bytes"),
    ]:
        with pytest.raises(InputError, match=message):
            SegPagedCache(model.config, HEADS, **options)
    with pytest.raises(HeadMapError, match="but the model has 3 layers of 2 KV heads"):
        SegPagedCache(model.config, HeadMap.all_global(3, 4))
    cache = SegPagedCache(model.config, HEADS)
    with torch.no_grad():
        model(prompt(2, 5), past_key_values=cache)
        with pytest.raises(InputError, match="holds 2 sequences, got a batch of 3"):
            model(prompt(3, 5), past_key_values=cache)
        wrong = SegPagedCache(model.config, HEADS, dtype=torch.bfloat16)
        with pytest.raises(InputError, match=r"torch.bfloat16 elements, got 2 of 32 torch.float32"):
            model(prompt(2, 5), past_key_values=wrong)


# --- crop ------------------------------------------------------------------------------------


def next_logits(model, ids, mask=None):
    return model(ids, attention_mask=mask, use_cache=False).logits[:, -1]


@torch.no_grad()
def test_crop_takes_back_the_last_pass(model):
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = SegPagedCache(model.config, HEADS, pool=poisoned_pool())
    model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
    model(ids[:, 40:46], attention_mask=mask[:, :46], past_key_values=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 40
    out = model(ids[:, 40:], attention_mask=mask, past_key_values=cache)
    assert_close(out.logits[:, -1], next_logits(model, ids, mask))
    cache.crop(0)
    assert cache.get_seq_length() == 60


@torch.no_grad()
def test_crop_refuses_what_local_heads_have_freed(model):
    cache = SegPagedCache(model.config, HEADS, page_size=PAGE)
    ids = prompt(1, 70)
    model(ids, past_key_values=cache)
    before = cache.stats()
    with pytest.raises(InputError, match="local heads have freed pages"):
        cache.crop(-50)
    with pytest.raises(InputError, match="cannot crop 71 of 70 tokens"):
        cache.crop(-71)
    with pytest.raises(InputError, match="negative number of tokens to remove, got 5"):
        cache.crop(5)
    assert cache.stats() == before
    exact = SegPagedCache(model.config, HeadMap.all_global(NUM_LAYERS, NUM_HEADS), page_size=PAGE)
    assert exact.is_croppable and not cache.is_croppable
    model(ids, past_key_values=exact)
    exact.crop(-50)
    assert exact.get_seq_length() == 20
    exact.crop(-20)
    assert exact.kv_bytes() == 0


@torch.no_grad()
def test_a_pass_that_broke_off_can_be_repeated(model):
    ids = prompt(2, 60)
    cache = SegPagedCache(model.config, HEADS, pool=poisoned_pool())
    model(ids[:, :40], past_key_values=cache)

    def fail(*_):
        raise ZeroDivisionError

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 40:], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 40
    out = model(ids[:, 40:], past_key_values=cache)
    assert cache.get_seq_length() == 60
    assert_close(out.logits[:, -1], next_logits(model, ids))


# --- batches ---------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_are_reordered_repeated_and_selected(model):
    ids, more = prompt(3, 37), prompt(4, 5, seed=9)
    pool = poisoned_pool()
    cache = SegPagedCache(model.config, HEADS, pool=pool)
    model(ids, past_key_values=cache)
    alone = cache.kv_bytes()
    cache.reorder_cache(torch.tensor([2, 0, 0, 2]))
    assert cache.kv_bytes() == alone // 3 * 2  # row 1 is gone, the copies share every page
    out = model(more, past_key_values=cache)
    both = torch.cat([ids[[2, 0, 0, 2]], more], 1)
    assert_close(out.logits[:, -1], next_logits(model, both))
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.batch_repeat_interleave(2)
    last = prompt(4, 3, seed=11)
    out = model(last, past_key_values=cache)
    assert_close(out.logits[:, -1], next_logits(model, torch.cat([both[[3, 3, 1, 1]], last], 1)))
    cache.reset()
    assert pool.allocator.stats()["num_sessions"] == 0
    assert pool.allocator.free_pages() == 600
    cache.reorder_cache(torch.tensor([0]))  # nothing to reorder


@torch.no_grad()
def test_caches_share_a_pool_and_give_it_back(model):
    pool = poisoned_pool()
    caches = [SegPagedCache(model.config, HEADS, pool=pool) for _ in range(3)]
    ids = [prompt(1, 20 + 9 * i, seed=i) for i in range(3)]
    tokens = [greedy(model, x, 12, past_key_values=c) for x, c in zip(ids, caches, strict=True)]
    assert pool.allocator.stats()["num_sessions"] == 3
    for x, expected in zip(ids, tokens, strict=True):
        assert torch.equal(greedy(model, x, 12), expected)
    caches.clear()
    gc.collect()
    assert pool.allocator.free_pages() == 600
