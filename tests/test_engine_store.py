"""An engine over a store: warm starts, faults that cost a miss and never a token."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from store_case import needs_redis, redis_server  # noqa: F401
from tiny_models import random_tokens, tiny_model

import redknot
from redknot.errors import InputError

DOCUMENTS = [random_tokens(np.random.default_rng(7 + i), 40 + 9 * i) for i in range(4)]
QUESTION = [5, 9, 11]


CLASSES = [["local", "global"], ["global", "local"], ["local", "global"]]


def make_engine(
    store="mem:", *, dtype=torch.float32, seed=0, page_size=16, classes=CLASSES, **options
):
    model = tiny_model("llama", 4, 2, dtype=dtype, seed=seed)
    return redknot.Engine(
        model,
        redknot.HeadMap(classes, window=24, sink=4),
        kv_budget="16MiB",
        page_size=page_size,
        store=store,
        poison_freed_pages=True,
        **options,
    )


def answer(engine, order=(0, 1, 2, 3), **options):
    ids = [engine.add(DOCUMENTS[i]) for i in order]
    return engine.generate(ids, QUESTION, max_new_tokens=8, **options)


def sources(result):
    return [document.source for document in result.explain().documents]


def test_another_process_starts_warm_with_the_same_tokens(tmp_path):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url) as engine:
        first = answer(engine)
        assert sources(first) == ["cached"] * 4  # computed by add
    code = f"""
import json, sys
sys.path[:0] = {[str(Path("tests").resolve()), str(Path("python").resolve())]!r}
from test_engine_store import answer, make_engine
engine = make_engine({url!r})
out = answer(engine, order=(0, 1, 2, 3))
[tier] = engine.store.tiers
print(json.dumps([out.token_ids, [[d.source, d.reason] for d in out.explain().documents],
                  tier.counts.hits, tier.counts.misses]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokens, documents, hits, misses = json.loads(done.stdout.splitlines()[-1])
    assert tokens == first.token_ids
    assert [source for source, _ in documents] == ["loaded"] * 4
    assert all(f"loaded from {url.split(':')[0]}" in reason for _, reason in documents)
    assert (hits, misses) == (5, 0)  # the prefix and four documents


@needs_redis
def test_another_engine_finds_documents_on_a_server(redis_server):  # noqa: F811
    url = f"{redis_server.url}?prefer=load"
    with make_engine(url) as engine:
        first = answer(engine)
    with make_engine(url) as engine:
        second = answer(engine)
        assert sources(second) == ["loaded"] * 4 and second.token_ids == first.token_ids
        assert all("loaded from redis" in d.reason for d in second.explain().documents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_sizes", [(16, 16), (16, 64), (32, 8)])
def test_stored_pages_serve_pools_of_any_page_size(dtype, page_sizes, tmp_path):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url, dtype=dtype, page_size=page_sizes[0]) as engine:
        expected = answer(engine, policy=redknot.Naive()).token_ids
    with make_engine(url, dtype=dtype, page_size=page_sizes[1]) as engine:
        result = answer(engine, policy=redknot.Naive())
        assert sources(result) == ["loaded"] * 4
        if dtype == torch.float32:
            assert result.token_ids == expected
        for document in [engine.add(DOCUMENTS[i]) for i in range(4)]:
            segment = engine.documents.find(document).segment
            with make_engine(dtype=dtype, page_size=page_sizes[1]) as fresh:
                other = fresh.documents.find(fresh.add(fresh_document(engine, document))).segment
                for layer in range(3):
                    for mine, theirs in zip(
                        rows_of(engine, segment, layer), rows_of(fresh, other, layer), strict=True
                    ):
                        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def fresh_document(engine, document):
    return engine.documents.token_ids(document)


def rows_of(engine, segment, layer):
    slots = torch.from_numpy(engine.pool.allocator.segment_slots(segment.handle, layer))
    return [cache.flatten(0, 1)[slots] for cache in (engine.pool.k_cache, engine.pool.v_cache)]


def test_evicted_documents_come_back_from_host_memory():
    with make_engine("mem:?capacity=32MiB&prefer=load") as engine:
        expected = answer(engine)
        engine.flush()
        while engine.documents.store.evict_one() is not None:
            pass
        again = answer(engine)
        assert sources(again) == ["loaded"] * 4 and again.token_ids == expected.token_ids


@pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": torch.bfloat16}, {"salt": "b"}])
def test_a_store_of_another_model_or_tenant_is_not_used(other, tmp_path):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url) as engine:
        answer(engine)
    with make_engine(url, **other) as engine:
        assert sources(answer(engine)) == ["cached"] * 4
        assert engine.store.tiers[0].counts.hits == 0
    with make_engine(url) as engine:
        assert sources(answer(engine)) == ["loaded"] * 4


def test_every_page_damaged_costs_misses_and_no_token(tmp_path, caplog):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url) as engine:
        expected = answer(engine)
    with make_engine(url) as engine:
        [tier] = engine.store.tiers
        whole = tier.backend.get_ranges

        def damaged(reads, timeout):
            statuses = whole(reads, timeout)
            reads[0].out[3] ^= 1
            return statuses

        tier.backend.get_ranges = damaged
        with caplog.at_level(logging.WARNING, logger="redknot"):
            result = answer(engine)
        assert result.token_ids == expected.token_ids
        assert sources(result) == ["computed"] * 4
        assert all("lmdb: damaged" in d.reason for d in result.explain().documents)
        assert tier.counts.failures == {"damaged": 5} and len(caplog.records) == 5
        del tier.backend.get_ranges
        engine.flush()  # what was damaged is written anew
    with make_engine(url) as engine:
        assert sources(answer(engine)) == ["loaded"] * 4


def test_documents_are_read_ahead(tmp_path):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    with make_engine(url) as engine:
        expected = answer(engine)
    with make_engine(url) as engine:
        ids = [engine.add(document) for document in DOCUMENTS]
        engine.prefetch(ids)
        result = engine.generate(ids, QUESTION, max_new_tokens=8)
        assert result.token_ids == expected.token_ids and sources(result) == ["loaded"] * 4
        assert engine.store.tiers[0].counts.hits == 5


def test_bad_stores_are_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="mem: behind another tier needs a size"):
        make_engine(["mem:?capacity=1MiB", "mem:"])
    with pytest.raises(InputError, match="must be mem:"):
        redknot.Engine("no such model", store="s3://x")


POLICIES = {
    "naive": redknot.Naive(),
    "redknot": redknot.RedKnot(),
    "boundary": redknot.RedKnot(boundary_rows=9),
}


@pytest.mark.parametrize("name", POLICIES)
def test_only_what_a_request_sees_is_read(name, tmp_path):
    """What is not read is far from everything in these engines' pools: one look would show."""
    url, policy = f"lmdb://{tmp_path}/store?prefer=load", POLICIES[name]
    with make_engine(url) as engine:
        expected = {key: answer(engine, policy=value) for key, value in POLICIES.items()}
    with make_engine(url) as engine:
        [tier] = engine.store.tiers
        result = answer(engine, policy=policy)
        assert sources(result) == ["loaded"] * 4
        assert torch.equal(result_logits(engine, policy), result_logits(engine, policy))
        assert result.token_ids == expected[name].token_ids
        stored = sum(tier.backend.sizes("d/", 5.0).values())
        share = {"naive": 0.75, "redknot": 0.65, "boundary": 0.65}[name]
        assert 0 < tier.counts.bytes_read < share * stored
        # Another policy needs other pages: they come when it asks, and nothing is computed.
        for other in POLICIES:
            again = answer(engine, policy=POLICIES[other], order=(0, 1, 2, 3))
            assert again.token_ids == expected[other].token_ids, other
            assert set(sources(again)) <= {"loaded", "cached"}
        assert tier.counts.failures == {}
    with make_engine(url) as engine:  # what is missing cannot be read: the document is computed
        answer(engine, policy=redknot.RedKnot())
        [tier] = engine.store.tiers
        tier.backend.remove(list(tier.backend.sizes("", 5.0)), 5.0)
        result = answer(engine, policy=redknot.Naive())
        assert result.token_ids == expected["naive"].token_ids
        assert "computed" in sources(result)


def result_logits(engine, policy):
    ids = [engine.add(document) for document in DOCUMENTS]
    return engine.prefill(ids, QUESTION, policy=policy).logits


def sees(rows, window, sink, j):
    return any(j <= i and (window < 0 or j < sink or j > i - window) for i in rows)


@pytest.mark.parametrize("picks", [False, True])
def test_needed_tokens_are_what_the_visibility_rule_says(picks):
    """Against the rule written out for every pair of positions."""
    from redknot.engine.needs import needs_of
    from redknot.engine.runner import HeadRules
    from redknot.recovery import LayerPlan, Pick, Placement, PromptLayout, RecoveryPlan

    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 30, 3)
        ends = 3 + np.cumsum(lengths)
        documents = tuple(
            Placement(int(end - n), int(end), 0, False)
            for end, n in zip(ends, lengths, strict=True)
        )
        total = int(ends[-1]) + 4
        layout = PromptLayout(3, documents, int(ends[-1]), total)
        inside = np.arange(3, ends[-1])
        layers, is_global = [], rng.random((4, 2)) < 0.4
        nothing, pick_layer = inside[:0], int(rng.integers(1, 3)) if picks else 4
        picked = inside[rng.random(len(inside)) < 0.1]
        for layer in range(4):
            live = inside[rng.random(len(inside)) < rng.choice([0.0, 0.3, 1.0])]
            fresh = live[rng.random(len(live)) < 0.7]
            step = LayerPlan(live, fresh, fresh[rng.random(len(fresh)) < 0.3])
            if layer == pick_layer:
                pick = Pick(len(picked), nothing, "foreign")
                step = LayerPlan(inside, nothing, nothing, pick=pick)
            if layer > pick_layer:  # of what the pick kept; in the last layer K and V alone
                step = LayerPlan(inside if layer < 3 else nothing, inside, nothing)
            layers.append(step)
        windows = np.where(is_global, -1, rng.integers(1, 20, (4, 2))).astype(np.int32)
        sinks = np.where(is_global, 0, rng.integers(0, 9, (4, 2))).astype(np.int32)
        arguments = (RecoveryPlan(tuple(layers)), layout, HeadRules(is_global, windows, sinks), 1)
        before = needs_of(*arguments)
        after = needs_of(*arguments, {id(inside): picked}) if picks else before
        for layer, step in enumerate(layers):
            query = range(layout.query_begin, total)
            for head in range(2):
                replaced = step.fresh if is_global[layer, head] else step.fresh_local
                rows, early = [*step.live, *query], [*step.live, *query]
                if layer >= pick_layer:
                    rows = [*(picked if len(step.live) else ()), *query]
                    early = [*query]
                    if layer == pick_layer and is_global[layer, head]:
                        rows = early = [*inside, *query]  # they are asked for the pick
                    if layer > pick_layer and replaced is inside:
                        replaced = picked
                w, s = windows[layer, head], sinks[layer, head]
                for document, first, then in zip(documents, before, after, strict=True):
                    group = first.now.group[layer, head]
                    for j in range(document.begin, document.end):
                        at = j - document.begin
                        expected = sees(rows, w, s, j) and j not in replaced
                        assert then.now.tokens[then.now.group[layer, head], at] == expected
                        # What is found out later had its place from the beginning.
                        assert first.all.tokens[group, at] >= expected
                        if not sees(early, w, s, j):
                            assert not first.now.tokens[group, at]
        assert picks or all(need.later is None for need in before)


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_hidden_states_are_stored_with_the_segments_that_have_them(fraction, tmp_path):
    url = f"lmdb://{tmp_path}/store?prefer=load"
    policy = redknot.LiveSpan(row_fraction=fraction)
    late = [["local", "local"], *CLASSES[1:]]  # rows enter behind the first layer
    with make_engine(url, policy=policy, classes=late) as engine:
        expected = answer(engine)
        # The engine alone, without a store, says the same.
        assert answer(make_engine(policy=policy, classes=late)).token_ids == expected.token_ids
    with make_engine(url, policy=policy, classes=late) as engine:
        result = answer(engine)
        assert result.token_ids == expected.token_ids and sources(result) == ["loaded"] * 4
        assert all(e.hidden is not None for e in segments_of(engine))
        # K and V come with them, for policies that need no hidden states.
        naive = answer(engine, policy=redknot.Naive())
        assert set(sources(naive)) <= {"loaded", "cached"}
        assert (
            naive.token_ids == answer(make_engine(classes=late), policy=redknot.Naive()).token_ids
        )


def segments_of(engine):
    ids = [engine.add(document) for document in DOCUMENTS]
    return [engine.documents.find(i, hidden_layer=engine.policy.entry_layer(engine.heads)).segment
            for i in ids]  # fmt: skip
