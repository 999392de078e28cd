"""Keys that are equal in every process, and the store in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from redknot.cache import KVPool
from redknot.store import MemoryStore, Segment, model_fingerprint, segment_key

BASE = {
    "fingerprint": "m", "dtype": torch.float32, "inv_freq": np.ones(4, np.float32),
    "prefix_ids": [1], "token_ids": [5, 6, 7],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "n"}, {"dtype": torch.bfloat16}, {"inv_freq": np.zeros(4, np.float32)},
     {"prefix_ids": []}, {"prefix_ids": [1, 5], "token_ids": [6, 7]}, {"token_ids": [5, 6]},
     {"stored": "kv+hidden"}],
    ids=lambda change: "+".join(change),
)  # fmt: skip
def test_whatever_differs_changes_the_key(change):
    assert segment_key(**BASE) == segment_key(**BASE)
    assert segment_key(**{**BASE, **change}) != segment_key(**BASE)


def test_another_process_makes_the_same_key():
    code = """
        import numpy as np, torch
        from redknot.store import segment_key, model_fingerprint
        print(segment_key(fingerprint="m", dtype=torch.float32, inv_freq=np.ones(4, np.float32),
                          prefix_ids=[1], token_ids=[5, 6, 7]))
        print(model_fingerprint({"b": 1, "a": [2]}, {"w": torch.arange(200.0)}))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out == [
        segment_key(**BASE), model_fingerprint({"a": [2], "b": 1}, {"w": torch.arange(200.0)}),
    ]  # fmt: skip


def test_fingerprint_sees_weights_and_config_but_not_the_folder():
    config, weights = {"hidden_size": 4, "_name_or_path": "/a"}, {"w": torch.ones(300)}
    same = model_fingerprint({**config, "_name_or_path": "/b"}, weights)
    assert model_fingerprint(config, weights) == same
    assert model_fingerprint({**config, "hidden_size": 5}, weights) != same
    assert model_fingerprint(config, {"w": torch.ones(300) * 2}) != same
    assert model_fingerprint(config, {"v": torch.ones(300)}) != same


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fingerprint_is_the_checkpoints_whatever_it_is_loaded_in(dtype):
    stored = torch.randn(5000, generator=torch.Generator().manual_seed(0)).half()
    same = model_fingerprint({"dtype": "float16"}, {"w": stored})
    assert model_fingerprint({"dtype": str(dtype)}, {"w": stored.to(dtype)}) == same


@pytest.fixture
def pool():
    return KVPool(num_layers=2, num_kv_heads=2, head_dim=8, num_pages=40, page_size=16)


def segment(pool, key: str, tokens: int = 16) -> Segment:
    handle = pool.allocator.create_segment(tokens, 0)
    return Segment(key, handle, 0, tokens, 1.0, 1.0)


def test_least_recently_used_goes_first(pool):
    store = MemoryStore(pool)
    for key in "abc":
        store.put(segment(pool, key))
    assert store.get("a") is not None
    evicted = store.evict_one(keep={"c"})
    assert evicted is not None and evicted.key == "b"
    assert store.was_evicted("b") and not store.was_evicted("a")
    assert store.get("b") is None
    assert (store.stats.hits, store.stats.misses, store.stats.evictions) == (1, 1, 1)
    assert store.evict_one(keep={"a", "c"}) is None
    store.clear()
    assert len(store) == 0 and pool.allocator.free_pages() == 40


def test_a_key_is_stored_once(pool):
    store = MemoryStore(pool)
    store.put(segment(pool, "a"))
    with pytest.raises(ValueError, match="already stored"):
        store.put(segment(pool, "a"))
