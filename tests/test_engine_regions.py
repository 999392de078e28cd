"""Hot and cold by (segment, head class, region): what leaves the pool first, what is read back."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

import redknot
from redknot.engine.documents import DocumentCache
from redknot.store.layout import REGIONS

CLASSES = [["local", "local"], ["global", "local"], ["local", "global"], ["local", "local"]]
LENGTH, WINDOW = 160, 16
DOCUMENTS = [random_tokens(np.random.default_rng(70 + i), LENGTH) for i in range(6)]
QUESTION = [5, 9, 11]


def make_engine(store="mem:", pages=None, classes=CLASSES, **options):
    model = tiny_model("llama", 4, 2, layers=len(classes))
    page_bytes = 2 * 16 * 32 * 4
    engine = redknot.Engine(
        model,
        redknot.HeadMap(classes, window=WINDOW, sink=4),
        kv_budget=pages * page_bytes if pages else "16MiB",
        page_size=16,
        store=store,
        poison_freed_pages=True,
        **options,
    )
    assert engine.pool.page_bytes == page_bytes
    return engine


def answer(engine, numbers, **options):
    ids = [engine.add(DOCUMENTS[number]) for number in numbers]
    return engine.generate(ids, QUESTION, max_new_tokens=6, **options)


def sources(result):
    return [document.source for document in result.explain().documents]


def held_pages(engine, number):
    """Pages of each region that a document has in the pool."""
    id_ = engine.documents.register(engine.format.document_ids(DOCUMENTS[number]))
    segment = engine.documents.store.peek(engine.documents._keys[id_][None])
    region = engine.documents.tiers.parts._region_of_pages(segment.num_tokens)
    slots = [engine.pool.allocator.segment_slots(segment.handle, layer) for layer in range(4)]
    has = np.stack([layer[::16].T >= 0 for layer in slots])
    return {name: int(has[region == number].sum()) for number, name in enumerate(REGIONS)}


@pytest.mark.parametrize("store", ["mem:", "lmdb"])
def test_what_no_request_reads_leaves_first(store, tmp_path):
    """Under `Naive` nothing looks at the middle of local heads, whether a tier has it or not."""
    url = f"lmdb://{tmp_path}/store?prefer=load" if store == "lmdb" else store
    naive = redknot.Naive()
    expected = [answer(make_engine(), [0, 1, n], policy=naive).token_ids for n in range(2, 6)]
    # Two whole documents, and the sinks, windows and global heads of the others.
    with make_engine(url, pages=2 * 80 + 4 * 40 + 30, policy=naive) as engine:
        for number in range(6):
            answer(engine, [number])
            engine.flush()
        for number in range(2, 6):
            result = answer(engine, [0, 1, number])
            assert result.token_ids == expected[number - 2]
            assert sources(result) == ["cached"] * 3  # nothing was computed or read again
        stats = engine.documents.store.stats
        assert stats.region_evictions == stats.evictions > 0
        held = [held_pages(engine, number) for number in range(6)]
        assert sum(pages["middle"] == 0 for pages in held) >= 3
        for pages in held:  # 6 of 8 heads are local; a row has 10 pages
            assert (pages["sink"], pages["window"], pages["global"]) == (6, 12, 20)
        if store == "mem:":
            return
        # Another policy asks for the middle: it is read, and only it.
        [tier] = engine.store.tiers
        before = tier.counts.bytes_read
        result = answer(engine, [0, 1], policy=redknot.RedKnot())
        assert result.token_ids == answer(make_engine(), [0, 1]).token_ids
        assert "loaded" in sources(result) and "computed" not in sources(result)
        assert 0 < tier.counts.bytes_read - before <= 2 * 42 * engine.pool.page_bytes


def test_without_a_tier_what_is_missing_is_computed_again():
    with make_engine(pages=2 * 80 + 4 * 40 + 30, policy=redknot.Naive()) as engine:
        for number in range(6):
            answer(engine, [number])
        held = [held_pages(engine, number)["middle"] for number in range(6)]
        gone, other = held.index(0), 5
        result = answer(engine, [other, gone], policy=redknot.RedKnot())
        assert result.token_ids == answer(make_engine(), [other, gone]).token_ids
        assert "evicted to make room, computed anew" in result.explain().documents[1].reason


def test_a_policy_that_reads_everything_evicts_the_longest_unused_document(tmp_path):
    """And of that the middle first, although every region was read by the same request."""
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url, pages=3 * 80 + 60) as engine:
        for number in range(3):
            answer(engine, [number])
        engine.flush()
        answer(engine, [1, 2])
        engine.add(DOCUMENTS[3])
        held = [held_pages(engine, number) for number in range(1, 4)]
        assert all(pages["middle"] == 42 for pages in held)
        result = answer(engine, [3, 0])  # the first of them makes room with regions of document 1
        assert result.token_ids == answer(make_engine(), [3, 0]).token_ids
        assert engine.documents.store.stats.region_evictions > 0


def test_regions_come_and_go_and_no_token_changes(tmp_path):
    """Random requests of all policies over a pool that holds two documents and a half."""
    rng = np.random.default_rng(3)
    policies = [redknot.Naive(), redknot.RedKnot(), redknot.LiveSpan(), redknot.Dense(),
                redknot.RedKnot(boundary_rows=5)]  # fmt: skip
    whole, expected = make_engine(), {}
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url, pages=400) as engine:
        for _ in range(40):
            numbers = tuple(rng.permutation(6)[: rng.integers(1, 4)].tolist())
            policy = policies[rng.integers(len(policies))]
            if (numbers, policy.name) not in expected:
                expected[numbers, policy] = answer(whole, numbers, policy=policy).token_ids
            result = answer(engine, numbers, policy=policy)
            assert result.token_ids == expected[numbers, policy], (numbers, policy)
        stats, [tier] = engine.documents.store.stats, engine.store.tiers
        assert stats.region_evictions > 10 and tier.counts.hits > 10
        assert tier.counts.failures == {}
        pool = engine.kv_stats()
        engine.clear()
        after = engine.kv_stats()
        assert after["num_free_pages"] == pool["num_pages"] - 1  # what stands for absent pages
        assert after["segment_pages"] == 1


LONG_SPAN = [["local"] * 2, ["global", "local"], *[["local"] * 2] * 3, ["local", "global"]]


# Where a weak global head comes first, rows are picked before anything is computed.
AHEAD = [["global", "local"], *LONG_SPAN[1:]]
SPANS = {
    "picked where they enter": (LONG_SPAN, {}),
    "picked ahead": (AHEAD, {"first_layer": 1, "early_fraction": 0.0}),
    "picked ahead and in layer 0": (AHEAD, {"first_layer": 1}),
}


def span_engine(url, classes=LONG_SPAN, **options):
    policy = redknot.LiveSpan(row_fraction=0.01, edge_rows=1, **options)
    return make_engine(url, policy=policy, classes=classes)


@pytest.mark.parametrize(("classes", "options"), SPANS.values(), ids=SPANS)
def test_rows_that_are_picked_are_read_after_the_pick(classes, options, tmp_path, monkeypatch):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    order = [3, 0, 1, 2]
    with span_engine(url, classes, **options) as engine:
        expected = answer(engine, order)
        assert engine.flush()
        everything = sum(engine.store.tiers[0].backend.sizes("d/", 5.0).values())
    with span_engine(url, classes, **options) as engine:
        [tier] = engine.store.tiers
        batches = []
        whole = tier.read

        def read(manifest, runs, buffer):
            batches.append(sum(run.num_bytes for run in runs))
            return whole(manifest, runs, buffer)

        tier.read = read
        result = answer(engine, order)
        assert result.token_ids == expected.token_ids and sources(result) == ["loaded"] * 4
        assert torch.equal(result.first_logits, expected.first_logits)
        # Prefix and documents, then what the picked rows see in local heads of the span's layers.
        assert len(batches) > 5 and tier.counts.bytes_read == sum(batches)
        reasons = [document.reason for document in result.explain().documents]
        assert any("then for the rows picked loaded from lmdb" in reason for reason in reasons)
    # Beside reading what any row might need, and beside reading everything.
    at_once = DocumentCache.read_ahead
    monkeypatch.setattr(
        DocumentCache, "read_ahead", lambda *a, all_at_once: at_once(*a, all_at_once=True)
    )
    with span_engine(url, classes, **options) as engine:
        assert answer(engine, order).token_ids == expected.token_ids
        assert sum(batches) < 0.8 * engine.store.tiers[0].counts.bytes_read < 0.8 * everything


def test_a_tier_that_is_lost_after_the_pick_costs_a_computation(tmp_path, caplog):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with span_engine(url) as engine:
        expected = answer(engine, [3, 0, 1, 2])
    with span_engine(url) as engine:
        [tier] = engine.store.tiers
        whole, calls = tier.backend.get_ranges, []

        def broken(reads, timeout):
            statuses = whole(reads, timeout)
            calls.append(len(reads))
            if len(calls) > 5:
                reads[0].out[3] ^= 1
            return statuses

        tier.backend.get_ranges = broken
        with caplog.at_level(logging.WARNING, logger="redknot"):
            result = answer(engine, [3, 0, 1, 2])
        assert result.token_ids == expected.token_ids
        assert "computed" in sources(result)
        assert tier.counts.failures["damaged"] == len(caplog.records) >= 1
        engine.clear()
        assert engine.kv_stats()["num_free_pages"] == engine.kv_stats()["num_pages"] - 1
