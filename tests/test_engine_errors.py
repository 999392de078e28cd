"""Bad input: one clear error, nothing half done. Evictions: counted misses, recomputed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

from redknot import (
    BudgetError,
    Engine,
    HeadMap,
    HeadMapError,
    InputError,
    ModelError,
    Naive,
    RedKnot,
    UnknownDocumentError,
)
from redknot.engine import Sampling
from redknot.engine.generation import GenerationLoop, Request

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", 4, 2)


def make_engine(model, **options) -> Engine:
    options = {"kv_budget": "8MiB", "page_size": 16, "poison_freed_pages": True, **options}
    return Engine(model, HeadMap.all_global(3, 2), **options)


@pytest.mark.parametrize("document", ["", "  \n", [], np.array([], dtype=np.int64)])
def test_an_empty_document(model, document):
    with pytest.raises(InputError, match="document is empty"):
        make_engine(model).add(document)


@pytest.mark.parametrize(
    ("document", "message"),
    [([3, 128], "outside the vocabulary of 128: 128"), ([-1], "vocabulary.*-1"),
     ([[1, 2]], "shape"), ([0.5], "float64"), ("text", "no tokenizer")],
)  # fmt: skip
def test_a_document_that_is_no_document(model, document, message):
    engine = make_engine(model)
    before = engine.kv_stats()
    with pytest.raises(InputError, match=message):
        engine.add(document)
    assert engine.kv_stats() == before


def test_longer_than_the_context(model):
    engine = make_engine(model, kv_budget="64MiB")
    with pytest.raises(InputError, match="2050 tokens, more than the model's context of 2048"):
        engine.add([5] * 2049)
    document = engine.add([5] * 2000)
    with pytest.raises(InputError, match="context of 2048"):
        engine.prefill([document], [5] * 48)
    with pytest.raises(InputError, match="prompt and new tokens"):
        engine.generate([document], [5] * 40, max_new_tokens=9)
    engine.generate([document], [5] * 40, max_new_tokens=8)


def test_unknown_document(model):
    with pytest.raises(UnknownDocumentError, match="unknown document id 'nope'"):
        make_engine(model).prefill(["nope"], [3])
    with pytest.raises(InputError, match="list of ids"):
        make_engine(model).prefill("nope", [3])


def test_an_empty_question(model):
    with pytest.raises(InputError, match="question is empty"):
        make_engine(model).prefill([], [])


def test_a_map_of_another_model(model):
    with pytest.raises(HeadMapError, match="4"):
        Engine(model, HeadMap.all_global(4, 2), kv_budget="1MiB", page_size=16)


@pytest.mark.parametrize("budget", ["many", "8 gigs", 0, -5])
def test_a_budget_that_is_none(model, budget):
    with pytest.raises(InputError, match="kv_budget"):
        make_engine(model, kv_budget=budget)


def test_a_budget_too_small_for_one_token(model):
    with pytest.raises(BudgetError, match="one token alone needs 6"):
        make_engine(model, kv_budget="8KiB")


def test_a_budget_too_small_for_one_request_changes_nothing(model):
    engine = make_engine(model, kv_budget="400KiB")
    documents = [engine.add([7] * 100), engine.add([9] * 60)]
    expected = engine.prefill(documents[:1], [3, 4], policy=Naive()).logits
    before = engine.kv_stats()
    with pytest.raises(BudgetError, match="raise kv_budget to at least"):
        engine.add([8] * 1000)
    with pytest.raises(BudgetError, match="a prompt of"):
        engine.generate(documents, [3] * 200, max_new_tokens=300)
    after = engine.kv_stats()
    assert after["num_sessions"] == before["num_sessions"] == 0
    assert torch.equal(engine.prefill(documents[:1], [3, 4], policy=Naive()).logits, expected)


def test_evicted_documents_are_counted_misses_and_computed_anew(model):
    engine = make_engine(model, kv_budget="400KiB")
    rng = np.random.default_rng(3)
    texts = [random_tokens(rng, 48) for _ in range(12)]
    documents = [engine.add(text) for text in texts]
    stats = engine.documents.store.stats
    assert stats.evictions > 0
    assert not engine.documents.is_cached(documents[0])
    misses = stats.misses
    prefill = engine.prefill([documents[0]], [5, 6], policy=Naive())
    report = prefill.explain().documents[0]
    assert stats.misses == misses + 1
    assert report.source == "computed"
    assert "evicted to make room" in report.reason
    fresh = make_engine(model)
    expected = fresh.prefill([fresh.add(texts[0])], [5, 6], policy=Naive())
    assert torch.equal(prefill.logits, expected.logits)
    again = engine.prefill([documents[0]], [5, 6], policy=Naive()).explain().documents[0]
    assert (again.source, again.reason.split(" (")[0]) == ("cached", "found in memory")


def test_add_is_idempotent(model):
    engine = make_engine(model)
    first = engine.add([5, 6, 7])
    before = engine.kv_stats()
    assert engine.add(torch.tensor([5, 6, 7])) == engine.add(np.array([5, 6, 7])) == first
    assert engine.kv_stats() == before


def test_models_that_are_refused(model):
    with pytest.raises(ModelError, match=r"model\.eval"):
        make_engine(model.train())
    model.eval()
    with pytest.raises(ModelError, match="no causal language model"):
        make_engine(model.model)
    gpt = type("Config", (), {"model_type": "gpt2"})
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: gemma2, llama"):
        make_engine(type("Model", (), {"config": gpt})())
    both_ways = tiny_model("gemma2", 4, 2, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="not causal"):
        make_engine(both_ways)


def test_a_policy_is_an_object(model):
    with pytest.raises(InputError, match=r"policy must be one such as .*, got 'naive'"):
        make_engine(model, policy="naive")
    with pytest.raises(InputError, match="policy must be one such as"):
        make_engine(model).prefill([], [5], policy=RedKnot)


@pytest.mark.parametrize("options", [{"page_size": 0}, {"page_size": 2.5}, {"store": "s3://x"}])
def test_bad_engine_options(model, options):
    with pytest.raises(InputError, match=next(iter(options))):
        make_engine(model, **options)


def test_batches_need_one_list_for_each_question(model):
    engine = make_engine(model)
    with pytest.raises(InputError, match="1 lists and 2 questions"):
        engine.generate([[engine.add([5])]], [[3], [4]])


def test_unused_modules_are_called_as_they_are(model):
    """A projection that is no plain Linear is called whole, and the ledger says so."""
    import copy

    wrapped = copy.deepcopy(model)

    class Counted(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            Counted.calls += 1
            return super().forward(x)

    for block in wrapped.model.layers:
        old = block.self_attn.k_proj
        block.self_attn.k_proj = Counted(old.in_features, old.out_features, bias=False)
        block.self_attn.k_proj.load_state_dict(old.state_dict())
        block.mlp.up_proj.register_forward_hook(lambda *_: setattr(Counted, "ffn", True))
    heads = HeadMap([["local", "global"]] * 3, window=8, sink=2)
    policy = RedKnot(dense_until=0, ffn_mass=0.4, recent_n=2)
    results = []
    for candidate in (model, wrapped):
        engine = Engine(candidate, heads, policy=policy, kv_budget="8MiB", page_size=16)
        documents = [engine.add([i] * 20) for i in (5, 6, 7)]
        results.append(engine.prefill(documents, [3, 4]))
    assert Counted.calls > 0 and Counted.ffn
    assert torch.allclose(results[0].logits, results[1].logits, atol=1e-4)
    assert results[1].ledger.parts["projections"] > results[0].ledger.parts["projections"]


def decode_under_a_full_pool(engine, document, fill) -> list[int]:
    """Prefill a request, let `fill` take every page, then decode 40 tokens."""
    admitted = engine._admission.admit([document], np.array([3, 4]), Naive(), new_tokens=0)
    loop = GenerationLoop(
        engine._runner,
        None,
        max_new_tokens=40,
        stop=(),
        make_room=lambda missing: engine.documents.make_room((), missing, "a decode step"),
    )
    try:
        list(loop.start(Request(0, admitted.session, admitted.rules, admitted.prefill), Sampling()))
        fill()
        list(loop.run())
        return loop.results()[0].token_ids
    finally:
        loop.release()


def test_decoding_evicts_documents_that_took_its_pages(model):
    engine = make_engine(model, kv_budget="500KiB")
    document = engine.add([7] * 40)
    expected = engine.generate([document], [3, 4], max_new_tokens=40, policy=Naive()).token_ids

    def fill():
        for number in range(3, 128):  # one page a head each, until nothing is left to take
            if engine.pool.allocator.free_pages() < 6:
                return
            engine.add([number] * 16)

    evictions = engine.documents.store.stats.evictions
    assert decode_under_a_full_pool(engine, document, fill) == expected
    assert engine.documents.store.stats.evictions > evictions


def test_decoding_that_finds_no_page_says_so(model):
    engine = make_engine(model, kv_budget="500KiB")
    document = engine.add([7] * 40)
    allocator = engine.pool.allocator

    def fill():
        engine.documents.store.clear()
        allocator.create_segment(16 * (allocator.free_pages() // 6), 0)  # nobody can evict it

    with pytest.raises(BudgetError, match="a decode step needs 6 pages"):
        decode_under_a_full_pool(engine, document, fill)
    assert engine.kv_stats()["num_sessions"] == 0
