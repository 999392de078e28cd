"""The relaxations, one by one, against a recovery written in the plainest torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import recovery as reference
from tiny_models import YARN, random_tokens, tiny_model

from redknot import Dense, Engine, HeadMap, InputError, Naive, RedKnot

pytestmark = pytest.mark.transformers

CLASSES = [["local", "global"], ["global", "local"], ["local", "global"]]
WINDOW, SINK = 12, 3
LENGTHS = (23, 31, 16, 40)
POLICIES = {
    "naive": (Naive(), {}),
    "redknot": (RedKnot(), {}),
    "boundary": (RedKnot(boundary_rows=5), {"boundary_rows": 5}),
    "boundary covers all": (RedKnot(boundary_rows=99), {"boundary_rows": 99}),
    "sparse ffn": (
        RedKnot(dense_until=1, ffn_mass=0.3, recent_n=2),
        {"dense_until": 1, "ffn_mass": 0.3, "recent_n": 2},
    ),
    "everything": (
        RedKnot(dense_until=1, ffn_mass=0.5, recent_n=4, boundary_rows=7),
        {"dense_until": 1, "ffn_mass": 0.5, "recent_n": 4, "boundary_rows": 7},
    ),
}
MODELS = {
    "llama": ("llama", 4, 2, {}),
    "qwen3": ("qwen3", 8, 2, {}),
    "mistral": ("mistral", 4, 2, {"sliding_window": 30}),
    "yarn": ("llama", 4, 2, {"rope_parameters": YARN}),
}


def make(family, q_heads, kv_heads, options, **engine_options):
    model = tiny_model(family, q_heads, kv_heads, **options)
    heads = HeadMap(CLASSES, window=WINDOW, sink=SINK)
    engine = Engine(
        model, heads, kv_budget="32MiB", page_size=16, poison_freed_pages=True, **engine_options
    )
    rng = np.random.default_rng(7)
    texts = [random_tokens(rng, n) for n in LENGTHS]
    return model, engine, texts, random_tokens(rng, 6)


def rules_of(**relaxations) -> reference.Rules:
    return reference.Rules(
        is_global=[[c == "global" for c in row] for row in CLASSES],
        window=[[WINDOW] * 2] * 3,
        sink=[[SINK] * 2] * 3,
        **relaxations,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference_recovery(name, policy):
    model, engine, texts, query = make(*MODELS[name])
    order = [2, 0, 3, 1]
    documents = [engine.add(text) for text in texts]
    policy, relaxations = POLICIES[policy]
    ours = engine.prefill([documents[i] for i in order], query, policy=policy)
    prefix = [1]
    expected = reference.recover(
        model,
        prefix,
        [texts[i] for i in order],
        query,
        [reference.offline(model, prefix, texts[i]) for i in order],
        rules_of(**relaxations),
        live=policy.name == "redknot",
    )
    assert (ours.logits - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_policies_differ():
    """No relaxation is without effect, so that none of the comparisons above is empty."""
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    policies = [Dense(), *(policy for policy, _ in POLICIES.values())]
    logits = [engine.prefill(documents, query, policy=policy).logits for policy in policies]
    for i, a in enumerate(logits):
        assert all((a - b).abs().max() > 1e-3 for b in logits[:i])


def test_a_mark_in_cached_local_values_shows():
    """Clean rows really read the cached K/V of local heads."""
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    before = engine.prefill(documents, query).logits
    segment = engine.documents.find(documents[1]).segment
    slots = engine.pool.allocator.segment_slots(segment.handle, 1)[:, 1]  # layer 1, a local head
    page_size = engine.pool.page_size
    last = int(slots[-3])  # a row in the middle of the prompt, inside later rows' windows
    engine.pool.v_cache[last // page_size, last % page_size] += 10.0
    after = engine.prefill(documents, query).logits
    assert (after - before).abs().max() > 1e-3


def test_a_mark_in_cached_global_values_does_not_show():
    """Global heads of moved documents are refreshed; of the first, at home, they are not."""
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    before = engine.prefill(documents, query).logits
    page_size = engine.pool.page_size
    for document, shows in ((documents[1], False), (documents[0], True)):
        segment = engine.documents.find(document).segment
        slot = int(engine.pool.allocator.segment_slots(segment.handle, 1)[3, 0])
        engine.pool.v_cache[slot // page_size, slot % page_size] += 10.0
        changed = (engine.prefill(documents, query).logits - before).abs().max() > 1e-3
        assert changed == shows
        engine.pool.v_cache[slot // page_size, slot % page_size] -= 10.0


def test_naive_and_redknot_agree_where_nothing_moved():
    """One document at home needs no recovery: both policies compute the very same."""
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(texts[0])]
    naive = engine.prefill(documents, query, policy=Naive())
    redknot = engine.prefill(documents, query, policy=RedKnot())
    assert torch.equal(naive.logits, redknot.logits)
    assert naive.ledger.flops == redknot.ledger.flops


def test_two_runs_are_bitwise_equal():
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    policy = RedKnot(dense_until=1, ffn_mass=0.4, boundary_rows=3)
    first = engine.prefill(documents, query, policy=policy)
    second = engine.prefill(documents, query, policy=policy)
    assert torch.equal(first.logits, second.logits)


def test_prefill_leaves_segments_and_pool_as_they_were():
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    before, k, v = engine.kv_stats(), engine.pool.k_cache.clone(), engine.pool.v_cache.clone()
    engine.prefill(documents[::-1], query, policy=RedKnot(boundary_rows=4))
    assert engine.kv_stats() == before
    for document in documents:
        handle = engine.documents.find(document).segment.handle
        for layer in range(3):
            slots = engine.pool.allocator.segment_slots(handle, layer)
            page, slot = slots // engine.pool.page_size, slots % engine.pool.page_size
            assert torch.equal(engine.pool.k_cache[page, slot], k[page, slot])
            assert torch.equal(engine.pool.v_cache[page, slot], v[page, slot])


@pytest.mark.parametrize(
    "options",
    [{"ffn_mass": 0.0}, {"ffn_mass": 1.5}, {"dense_until": -1}, {"boundary_rows": 2.5},
     {"deep_start": 3}, {"ffn_mass_deep": 0.5}],
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=r"RedKnot: .*"):
        RedKnot(**options)
