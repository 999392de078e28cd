"""The ledger against counting by hand, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from reference.recovery import _visible
from tiny_models import random_tokens, tiny_model

from redknot import Dense, Engine, HeadMap, Naive, RedKnot
from redknot.recovery import (
    FlopCounter,
    LiveSpan,
    ModelShape,
    Placement,
    PromptLayout,
    dense_prefill_flops,
)
from redknot.recovery.ledger import own_keys, visible_keys

SHAPE = ModelShape(
    num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=16, ffn_dim=24,
    vocab_size=50,
)  # fmt: skip


@pytest.mark.parametrize("window", [-1, 1, 4, 100])
@pytest.mark.parametrize("sink", [0, 1, 6])
def test_visible_keys_counts_the_mask(window, sink):
    length = 23
    mask = _visible(length, window < 0, window, sink, None)
    positions = np.array([0, 1, 5, 6, 7, 21, 22])
    assert visible_keys(positions, window, sink) == int(mask[positions].sum())


def test_dense_prefill_by_hand():
    length, e, d = 7, SHAPE.hidden_dim, SHAPE.head_dim
    projections = 2 * length * e * (4 * d) * 2 + 2 * length * e * (2 * d) * 2
    attention = 4 * (2 * 2 * d * length * (length + 1) // 2)
    rotation = 3 * d * length * (4 + 2)
    ffn = 6 * length * e * SHAPE.ffn_dim
    expected = 2 * (projections + attention + rotation + ffn) + 2 * e * SHAPE.vocab_size
    assert dense_prefill_flops(SHAPE, length, np.full((2, 2), -1)) == expected


def test_attention_weighs_heads_by_their_own_rule():
    counter = FlopCounter(SHAPE)
    positions = np.arange(10)
    counter.attention(positions, np.array([-1, 3]), np.array([0, 1]))
    pairs = sum(
        int(_visible(10, g, w, s, None).sum()) for g, w, s in ((True, -1, 0), (False, 3, 1))
    )
    assert counter.close()["attention"] == 4 * SHAPE.head_dim * SHAPE.group_size * pairs


@pytest.mark.transformers
def test_the_engines_ledger():
    model = tiny_model("llama", 4, 2)
    heads = HeadMap([["local", "global"]] * 3, window=8, sink=2)
    engine = Engine(model, heads, kv_budget="8MiB", page_size=16)
    rng = np.random.default_rng(0)
    documents = [engine.add(random_tokens(rng, n)) for n in (30, 40, 50)]
    question = random_tokens(rng, 6)
    dense, naive, redknot = (
        engine.prefill(documents, question, policy=p).ledger for p in (Dense(), Naive(), RedKnot())
    )
    assert dense.flops == dense.dense_flops and dense.saved == 0
    assert dense.dense_flops == naive.dense_flops == redknot.dense_flops
    assert 0 < redknot.saved < naive.saved < 1
    assert redknot.prefix_cached_dense_flops < redknot.dense_flops
    assert redknot.offline_flops > 0 == dense.offline_flops
    gain = redknot.dense_flops - redknot.flops
    assert math.isclose(redknot.break_even_reuses, redknot.offline_flops / gain)
    assert dense.break_even_reuses == math.inf
    # 90 moved rows and 6 of the query: FFN of every one, three layers.
    assert redknot.parts["ffn"] == 3 * 6 * 96 * 64 * 96
    sparse = engine.prefill(
        documents, question, policy=RedKnot(dense_until=1, ffn_mass=0.2, recent_n=0)
    ).ledger
    assert sparse.parts["ffn"] < redknot.parts["ffn"]
    assert sparse.parts["ffn"] % (6 * 64 * 96) == 0
    assert sparse.parts["selection"] == 2 * 2 * 96 * 4 * 32


@pytest.mark.parametrize("window", [-1, 1, 9, 100])
def test_own_keys_counts_prefix_and_own_document(window):
    bounds = [(3, 10), (10, 11), (11, 30)]
    layout = PromptLayout(3, tuple(Placement(b, e, 0, exact=False) for b, e in bounds), 30, 33)
    mask = _visible(33, window < 0, window, 0, None)
    rows = np.array([3, 4, 9, 10, 11, 25, 29])
    expected = sum(
        int(mask[row, :3].sum() + mask[row, begin:end].sum())
        for row in rows
        for begin, end in bounds
        if begin <= row < end
    )
    assert own_keys(rows, window, layout) == expected


@pytest.mark.transformers
@pytest.mark.parametrize("first_layer", [1, 2])  # 2: from the embeddings on
@pytest.mark.parametrize("refresh_local", [True, False])
def test_live_span_counts_what_it_computes(refresh_local, first_layer):
    """Every part, row by row, from which rows lived: nothing outside, no column too many."""
    model = tiny_model("llama", 4, 2, layers=5)  # hidden 64, ffn 96, head_dim 32, group 2
    classes = [["local"] * 2 for _ in range(5)]
    for layer, head in ((1, 0), (1, 1), (2, 1), (3, 0)):
        classes[layer][head] = "global"
    window, sink, lengths, question = 8, 2, (30, 40, 50), 6
    engine = Engine(
        model, HeadMap(classes, window=window, sink=sink), kv_budget="8MiB", page_size=16
    )
    rng = np.random.default_rng(0)
    documents = [engine.add(random_tokens(rng, n)) for n in lengths]
    policy = LiveSpan(
        row_fraction=0.1, edge_rows=2, refresh_local=refresh_local, first_layer=first_layer
    )
    prefill = engine.prefill(documents, random_tokens(rng, question), policy=policy)
    e, f, d, length = 64, 96, 32, 1 + sum(lengths) + question
    query = list(range(length - question, length))
    moved = list(range(31, 121))

    live = {layer: [] for layer in range(5)}
    for document in prefill.explain().documents:
        for item in document.live:
            for layer in range(item.begin_layer, item.end_layer):
                live[layer] += [row for run in item.positions for row in range(*run)]
    num_picked = 9 + 2  # by what is brought to them, and because these read them
    first = 4 + num_picked * (first_layer == 2)
    assert [len(live[layer]) for layer in range(5)] == [first, 15, 15, 0, 0]

    fresh = {1: live[0], 2: live[1], 3: live[2]}
    parts = dict.fromkeys(("projections", "attention", "rotation", "ffn", "probe"), 0)
    for layer in range(5):
        rows = live[layer] + query
        every_head = refresh_local and layer < 3  # where rows attend
        num_heads = 2 if every_head else classes[layer].count("global")
        key_rows = 2 * question + num_heads * len(fresh.get(layer, []))
        parts["projections"] += 2 * 2 * e * 4 * d * len(rows) + 2 * 2 * e * d * key_rows
        parts["rotation"] += 3 * d * (4 * len(rows) + key_rows)
        parts["ffn"] += 6 * e * f * len(rows)
        for kind in classes[layer]:
            seen = _visible(length, kind == "global", window, sink, None)
            parts["attention"] += 4 * d * 2 * int(seen[rows].sum())
    everything = _visible(length, True, -1, 0, None)
    own = sum(int(everything[row, [0, *range(31, 71)]].sum()) for row in moved[:40])
    own += sum(int(everything[row, [0, *range(71, 121)]].sum()) for row in moved[40:])
    heads = 2 * classes[first_layer].count("global")  # query heads that pick
    parts["probe"] += len(moved) * heads * d * (2 * e + 3 + 2 + 4)
    parts["probe"] += 4 * d * heads * (int(everything[moved].sum()) + own)
    # What the nine that are kept for what is brought to them read.
    parts["probe"] += len(moved) * d * (3 * heads // 2 + 2 * heads * 9)
    parts["lm_head"] = 2 * e * 128
    assert prefill.ledger.parts == parts
    assert prefill.ledger.flops == sum(parts.values())
