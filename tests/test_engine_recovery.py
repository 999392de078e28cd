"""The relaxations, one by one, against a recovery written in the plainest torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import recovery as reference
from tiny_models import YARN, random_tokens, tiny_model

from redknot import Engine, HeadMap, InputError
from redknot.engine import recovery_pass
from redknot.recovery import (
    POLICIES as REGISTERED,
)
from redknot.recovery import (
    CacheBlend,
    Dense,
    DuoAttention,
    Epic,
    LiveSpan,
    Naive,
    RandomRows,
    RedKnot,
)
from redknot.recovery.span import span_begin

pytestmark = pytest.mark.transformers

CLASSES = [["local", "global"], ["global", "local"], ["local", "global"]]
WINDOW, SINK = 12, 3
LENGTHS = (23, 31, 16, 40)
SPARSE = {"dense_until": 1, "ffn_mass": 0.3, "recent_n": 2}
SPAN = {"row_fraction": 0.2, "read_fraction": 0.08, "early_fraction": 0.1, "edge_rows": 3}
POLICIES = {
    "naive": (Naive(), {"policy": "naive"}),
    "redknot": (RedKnot(), {}),
    "boundary": (RedKnot(boundary_rows=5), {"boundary_rows": 5}),
    "boundary covers all": (RedKnot(boundary_rows=99), {"boundary_rows": 99}),
    "sparse ffn": (RedKnot(**SPARSE), SPARSE),
    "sparse ffn, foreign": (
        RedKnot(signal="foreign", **SPARSE), {"ffn_signal": "foreign", **SPARSE},
    ),
    "everything": (
        RedKnot(dense_until=1, ffn_mass=0.5, recent_n=4, boundary_rows=7),
        {"dense_until": 1, "ffn_mass": 0.5, "recent_n": 4, "boundary_rows": 7},
    ),
    "epic": (Epic(first_rows=4), {"policy": "epic", "first_rows": 4}),
    "cacheblend": (CacheBlend(ratio=0.3), {"policy": "cacheblend", "ratio": 0.3}),
    "cacheblend, later": (
        CacheBlend(ratio=0.3, pick_layer=2),
        {"policy": "cacheblend", "ratio": 0.3, "pick_layer": 2},
    ),
    "live span": (LiveSpan(**SPAN), {"policy": "live_span", **SPAN}),
    "live span, all rows": (
        LiveSpan(row_fraction=1.0, edge_rows=0), {"policy": "live_span"},
    ),
    "live span, by norm": (
        LiveSpan(signal="attention_norm", **SPAN),
        {"policy": "live_span", "signal": "attention_norm", **SPAN},
    ),
    "live span, cached local heads": (
        LiveSpan(refresh_local=False, **SPAN),
        {"policy": "live_span", "refresh_local": False, **SPAN},
    ),
    "live span, boundary": (
        LiveSpan(boundary_rows=4, **SPAN), {"policy": "live_span", "boundary_rows": 4, **SPAN},
    ),
    "live span, sparse ffn": (
        LiveSpan(ffn_mass=0.6, row_fraction=0.4, read_fraction=0.0, edge_rows=4),
        {"policy": "live_span", "ffn_mass": 0.6, "row_fraction": 0.4, "edge_rows": 4,
         "ffn_signal": "foreign"},
    ),
}  # fmt: skip
MODELS = {
    "llama": ("llama", 4, 2, {}),
    "qwen3": ("qwen3", 8, 2, {}),
    "mistral": ("mistral", 4, 2, {"sliding_window": 30}),
    "yarn": ("llama", 4, 2, {"rope_parameters": YARN}),
}


SPAN_MAPS = {  # five layers; those with global heads may be any of them
    "entry, gap": [["local", "local"], ["local", "global"], ["local", "local"],
                   ["retrieval", "local"], ["local", "local"]],
    "dense first layer": [["dense", "dense"], ["local", "local"], ["global", "local"],
                          ["local", "local"], ["local", "global"]],
    "one layer": [["local", "local"], ["local", "local"], ["local", "global"],
                  ["local", "local"], ["local", "local"]],
    "all but one": [["global", "global"]] * 3 + [["global", "local"], ["global", "global"]],
    "none": [["local", "local"]] * 5,
}  # fmt: skip


def make(family, q_heads, kv_heads, options, *, classes=CLASSES, metadata=None, **engine_options):
    model = tiny_model(family, q_heads, kv_heads, layers=len(classes), **options)
    heads = HeadMap(classes, window=WINDOW, sink=SINK, metadata=metadata)
    engine = Engine(
        model, heads, kv_budget="32MiB", page_size=16, poison_freed_pages=True, **engine_options
    )
    rng = np.random.default_rng(7)
    texts = [random_tokens(rng, n) for n in LENGTHS]
    return model, engine, texts, random_tokens(rng, 6)


def rules_of(classes=CLASSES, **relaxations) -> reference.Rules:
    all_heads = relaxations.get("policy") in ("epic", "cacheblend")
    return reference.Rules(
        is_global=[[all_heads or c != "local" for c in row] for row in classes],
        window=[[WINDOW] * 2] * len(classes),
        sink=[[SINK] * 2] * len(classes),
        **relaxations,
    )


def check(model, engine, texts, query, policy, rules, *, order=(2, 0, 3, 1), prefix=(1,)):
    """The engine's logits and live rows are those of the reference."""
    documents = [engine.add(text) for text in texts]
    ours = engine.prefill([documents[i] for i in order], query, policy=policy)
    prefix = list(prefix)
    expected = reference.recover(
        model,
        prefix,
        [texts[i] for i in order],
        query,
        [reference.offline(model, prefix, texts[i]) for i in order],
        rules,
    )
    for layer, lived in rules.lived.items():
        rows = {
            row
            for document in ours.explain().documents
            for live in document.live
            if live.begin_layer <= layer < live.end_layer
            for run in live.positions
            for row in range(*run)
        }
        assert rows | set(range(len(lived) - len(query), len(lived))) == set(
            lived.nonzero().flatten().tolist()
        )
    assert (ours.logits - expected).abs().max() <= 2e-4 * expected.abs().max()
    return ours


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference_recovery(name, policy):
    policy, relaxations = POLICIES[policy]
    check(*make(*MODELS[name]), policy, rules_of(**relaxations))


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_in_several_chunks_equal_the_reference_too(policy, monkeypatch):
    """16 of up to 117 rows at a time."""
    monkeypatch.setattr(recovery_pass, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(recovery_pass, "_TILE_ROWS", 16)
    policy, relaxations = POLICIES[policy]
    check(*make(*MODELS["llama"]), policy, rules_of(**relaxations))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name.startswith("live span")])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("classes", SPAN_MAPS.values(), ids=SPAN_MAPS)
def test_live_span_equals_the_reference_wherever_global_heads_sit(classes, name, policy):
    policy, relaxations = POLICIES[policy]
    check(*make(*MODELS[name], classes=classes), policy, rules_of(classes, **relaxations))


@pytest.mark.parametrize("ffn", [{}, {"ffn_mass": 0.5}], ids=["dense ffn", "sparse ffn"])
@pytest.mark.parametrize("first_layer", [2, 4])
def test_live_span_may_begin_behind_a_global_head(first_layer, ffn):
    """Rows are picked there, with what is stored, and computed from the embeddings on."""
    options = {"first_layer": first_layer, **SPAN, **ffn}
    classes = SPAN_MAPS["dense first layer"]
    signal = {"ffn_signal": "foreign"} if ffn else {}
    rules = rules_of(classes, policy="live_span", **options, **signal)
    check(*make(*MODELS["llama"], classes=classes), LiveSpan(**options), rules)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_are_picked_by_the_heads_that_matter(family):
    """The strongest head of the layer that matters picks, and a weak one of layer 0 its few."""
    classes = [["global", "global"], ["local", "local"], ["global", "global"],
               ["local", "local"], ["local", "global"]]  # fmt: skip
    kl = [[0.01, 0.004], [0.0, 0.0], [0.49, 1.0], [0.0, 0.0], [0.0, 0.5]]
    made = make(*MODELS[family], classes=classes, metadata={"kv_head_kl": kl})
    rules = rules_of(classes, policy="live_span", first_layer=2, probed={0: [0], 2: [1]}, **SPAN)
    check(*made, LiveSpan(**SPAN), rules)
    picked = rules.lived[2]
    assert torch.equal(rules.lived[0], picked)
    without = {"early_fraction": 0.0}, {"read_fraction": 0.0}
    for other in ({"probed": {0: [0]}}, {"probed": {2: [1]}}, *without):
        options = {"policy": "live_span", "first_layer": 2, "probed": rules.probed, **SPAN, **other}
        changed = rules_of(classes, **options)
        model, _, texts, query = made
        order = [texts[i] for i in (2, 0, 3, 1)]
        cached = [reference.offline(model, [1], text) for text in order]
        reference.recover(model, [1], order, query, cached, changed)
        assert not torch.equal(changed.lived[2], picked)


def test_the_span_begins_with_the_first_head_that_matters():
    classes = [["global", "local"], ["global", "global"], ["local", "local"], ["global", "local"]]

    def begin(kl):
        metadata = None if kl is None else {"kv_head_kl": kl}
        return span_begin(HeadMap(classes, window=WINDOW, sink=SINK, metadata=metadata))

    assert begin(None) == 0
    assert begin([[0.04, 0], [0.5, 0.0], [0, 0], [0.1, 0]]) == 1
    assert begin([[0.05, 0], [0.5, 0.0], [0, 0], [0.1, 0]]) == 0
    assert begin([[0.01, 0], [0.02, 0.0], [0, 0], [0.9, 0]]) == 3
    assert begin([[0, 9.0], [0.1, 0.0], [9.0, 9.0], [0.2, 0]]) == 1  # local heads do not count
    assert begin([[0.1, 0.5]]) == 0  # of another shape: not of this map
    unmeasured = float("nan")
    assert begin([[0.01, unmeasured], [0.5, 0.5], [0, 0], [0, 0]]) == 1  # a local head
    assert begin([[unmeasured, 0], [0.5, 0.5], [0, 0], [0, 0]]) == 0
    assert span_begin(HeadMap([["local"]], window=WINDOW, sink=SINK)) is None
    with pytest.raises(InputError, match="first_layer 2 is not a layer with a global head"):
        LiveSpan(first_layer=2).entry_layer(HeadMap(classes, window=WINDOW, sink=SINK))


@pytest.mark.parametrize("prefix", [[], [9, 8, 7, 6]])
def test_live_span_behind_any_prefix(prefix):
    policy, relaxations = POLICIES["live span"]
    classes = SPAN_MAPS["entry, gap"]
    made = make(*MODELS["llama"], classes=classes, prefix=prefix)
    check(*made, policy, rules_of(classes, **relaxations), prefix=prefix)


def test_live_span_finds_the_same_rows_whatever_the_cache_held_before():
    """Documents added without hidden states get them, in the request that needs them."""
    policy, relaxations = POLICIES["live span"]
    classes = SPAN_MAPS["entry, gap"]
    made = make(*MODELS["llama"], classes=classes)
    late = check(*made, policy, rules_of(classes, **relaxations))
    assert all("without hidden states" in d.reason for d in late.explain().documents)
    made = make(*MODELS["llama"], classes=classes, policy=policy)
    early = check(*made, policy, rules_of(classes, **relaxations))
    assert all(d.source == "cached" for d in early.explain().documents)
    assert torch.equal(early.logits, late.logits)


def test_random_rows_are_a_live_span_of_rows_drawn_by_chance():
    classes = SPAN_MAPS["entry, gap"]
    drawn = set()
    for seed in (0, 1):
        made = make(*MODELS["llama"], classes=classes)
        policy = RandomRows(row_fraction=0.2, edge_rows=3, draw_seed=seed)
        documents = [made[1].add(text) for text in made[2]]
        report = made[1].explain([documents[i] for i in (2, 0, 3, 1)], made[3], policy=policy)
        live = [
            row
            for document in report.documents
            for item in document.live
            if item.begin_layer == 1
            for run in item.positions
            for row in range(*run)
        ]
        num_moved = sum(LENGTHS) - LENGTHS[2]
        assert len(live) == 3 * 3 + -(-num_moved // 5)
        rules = rules_of(classes, policy="live_span", rows=live, edge_rows=3)
        check(*made, policy, rules)
        drawn.add(tuple(live))
    assert len(drawn) == 2


@pytest.mark.parametrize(
    "policy",
    [
        LiveSpan(row_fraction=1.0),
        LiveSpan(row_fraction=1.0, edge_rows=0),
        LiveSpan(row_fraction=0.1, boundary_rows=99),
        CacheBlend(ratio=1.0),
        Epic(first_rows=99),
        DuoAttention(),
    ],
    ids=lambda policy: policy.name,
)
def test_everything_live_equals_dense(policy):
    classes = [["global", "global"]] * 4
    _, engine, texts, query = make(*MODELS["llama"], classes=classes)
    documents = [engine.add(text) for text in texts]
    ours = engine.prefill(documents, query, policy=policy).logits
    dense = engine.prefill(documents, query, policy=Dense()).logits
    assert (ours - dense).abs().max() <= 1e-4 * dense.abs().max()


def test_duo_attention_keeps_less_than_dense_and_computes_every_row():
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    duo = engine.prefill(documents, query, policy=DuoAttention())
    dense = engine.prefill(documents, query, policy=Dense())
    assert duo.kv_bytes < dense.kv_bytes
    assert duo.ledger.parts["ffn"] == dense.ledger.parts["ffn"]
    assert duo.ledger.parts["attention"] < dense.ledger.parts["attention"]
    assert (duo.logits - dense.logits).abs().max() > 1e-3


def test_random_ffn_rows_hold_about_the_mass():
    _, engine, texts, query = make(*MODELS["llama"])
    documents = [engine.add(text) for text in texts]
    policy = RedKnot(ffn_mass=0.3, recent_n=0, signal="random")
    some, every = (
        engine.prefill(documents, query, policy=p).ledger.parts["ffn"] for p in (policy, RedKnot())
    )
    # The largest of uniform draws that hold 30 % of their sum: a share of 1 - sqrt(.7) = .16.
    assert 0.1 < some / every < 0.3


def test_every_policy_is_registered_by_its_name():
    assert set(REGISTERED) == {
        "dense", "naive", "epic", "cacheblend", "duoattention", "redknot", "live_span",
        "random_rows",
    }  # fmt: skip
    assert all(isinstance(REGISTERED[name](), REGISTERED[name]) for name in REGISTERED)


def test_policies_differ():
    """No relaxation is without effect, so that none of the comparisons above is empty."""
    _, engine, texts, query = make(*MODELS["llama"], classes=SPAN_MAPS["entry, gap"])
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


BAD_OPTIONS = [
    (RedKnot, {"ffn_mass": 0.0}), (RedKnot, {"ffn_mass": 1.5}), (RedKnot, {"dense_until": -1}),
    (RedKnot, {"boundary_rows": 2.5}), (RedKnot, {"deep_start": 3}),
    (RedKnot, {"ffn_mass_deep": 0.5}), (RedKnot, {"signal": "norm"}), (Epic, {"first_rows": -1}),
    (CacheBlend, {"ratio": 0.0}), (CacheBlend, {"pick_layer": "first"}),
    (LiveSpan, {"row_fraction": 1.1}), (LiveSpan, {"signal": "random"}),
    (LiveSpan, {"edge_rows": -1}), (LiveSpan, {"ffn_signal": "all"}),
    (LiveSpan, {"first_layer": -1}), (LiveSpan, {"first_layer": "auto"}),
    (RandomRows, {"row_fraction": -0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "options"), BAD_OPTIONS)
def test_bad_options_are_refused(policy, options):
    with pytest.raises(InputError, match=rf"{policy.__name__}: .*"):
        policy(**options)
