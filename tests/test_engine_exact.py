"""Exact mode: every head global, mass 1, all rows live, equals Hugging Face's dense prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import GEMMA2, LLAMA3, YARN, random_tokens, tiny_model

from redknot import Dense, Engine, HeadMap, ModelError, RedKnot, ops

pytestmark = pytest.mark.transformers

MODELS = {
    "llama-mha": ("llama", 4, 4, {}),
    "llama-gqa4": ("llama", 8, 2, {}),
    "qwen2-gqa8": ("qwen2", 8, 1, {}),
    "qwen2-sliding": (
        "qwen2", 4, 2, {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3-gqa2": ("qwen3", 4, 2, {}),
    "mistral-sliding": ("mistral", 4, 2, {"sliding_window": 24}),
    "mistral-full": ("mistral", 4, 1, {"sliding_window": None}),
    "llama-yarn": ("llama", 4, 2, {"rope_parameters": YARN}),
    "llama-llama3": ("llama", 4, 2, {"rope_parameters": LLAMA3}),
    "gemma2": ("gemma2", 4, 2, GEMMA2),
}  # fmt: skip
LENGTHS = {"one document": [37], "odd": [37, 16, 61], "five": [5, 33, 1, 64, 17], "none": []}


def make_engine(model, **options) -> Engine:
    heads = HeadMap.all_global(model.config.num_hidden_layers, model.config.num_key_value_heads)
    return Engine(model, heads, kv_budget="32MiB", page_size=16, poison_freed_pages=True, **options)


def hugging_face_logits(model, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids]), logits_to_keep=1).logits[0, -1]


def hugging_face_greedy(model, token_ids: list[int], count: int) -> list[int]:
    out = model.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False)
    return out[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("policy", [RedKnot(), Dense()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", MODELS)
def test_equals_hugging_face(name, policy):
    family, q_heads, kv_heads, options = MODELS[name]
    model = tiny_model(family, q_heads, kv_heads, **options)
    engine = make_engine(model, policy=policy)
    rng = np.random.default_rng(1)
    documents = [engine.add(random_tokens(rng, n)) for n in LENGTHS["odd"]]
    answer = engine.generate(documents[::-1], random_tokens(rng, 7), max_new_tokens=64)
    expected = hugging_face_logits(model, answer.prompt_token_ids)
    logits = engine.prefill(documents[::-1], answer.prompt_token_ids[-7:]).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert answer.token_ids == hugging_face_greedy(model, answer.prompt_token_ids, 64)


@pytest.mark.parametrize("case", LENGTHS)
def test_any_number_of_documents(case):
    model = tiny_model("llama", 8, 2)
    engine = make_engine(model)
    rng = np.random.default_rng(2)
    documents = [engine.add(random_tokens(rng, n)) for n in LENGTHS[case]]
    prefill = engine.prefill(documents, random_tokens(rng, 5))
    expected = hugging_face_logits(model, prefill.token_ids)
    assert (prefill.logits - expected).abs().max() <= 1e-4 * expected.abs().max()


PREFIXES = {
    "long prefix": {"prefix": [9, 8, 7, 6, 5]},
    "no prefix": {"prefix": []},
    "alone": {"behind_prefix": False},
    "alone, no prefix": {"prefix": [], "behind_prefix": False},
}


@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES)
def test_any_prefix(options):
    model = tiny_model("llama", 4, 2)
    engine = make_engine(model, **options)
    rng = np.random.default_rng(3)
    documents = [engine.add(random_tokens(rng, n)) for n in (20, 31)]
    prefill = engine.prefill([documents[1], documents[0], documents[1]], random_tokens(rng, 4))
    expected = hugging_face_logits(model, prefill.token_ids)
    assert prefill.token_ids[: len(options.get("prefix", [1]))] == options.get("prefix", [1])
    assert (prefill.logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_local_windows_that_cover_everything_are_exact():
    model = tiny_model("llama", 4, 2)
    heads = HeadMap.all_local(3, 2, window=512, sink=4)
    engine = Engine(
        model, heads, policy=RedKnot(boundary_rows=512), kv_budget="32MiB", page_size=16
    )
    rng = np.random.default_rng(4)
    documents = [engine.add(random_tokens(rng, n)) for n in (40, 25, 33)]
    prefill = engine.prefill(documents, random_tokens(rng, 6))
    expected = hugging_face_logits(model, prefill.token_ids)
    assert (prefill.logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_is_as_close_to_fp32_as_hugging_face(family):
    exact = tiny_model(family, 8, 2)
    model = tiny_model(family, 8, 2, dtype=torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same rounded weights
    engine = make_engine(model)
    rng = np.random.default_rng(5)
    documents = [engine.add(random_tokens(rng, n)) for n in (37, 50, 16)]
    ours, theirs = [], []
    for _ in range(8):
        prefill = engine.prefill(documents[::-1], random_tokens(rng, 9))
        truth = hugging_face_logits(exact, prefill.token_ids)
        ours.append((prefill.logits.float() - truth).abs().max())
        theirs.append((hugging_face_logits(model, prefill.token_ids).float() - truth).abs().max())
    assert max(ours) <= 2 * max(theirs)


def test_exact_mode_takes_the_same_pages_and_ops(monkeypatch):
    model = tiny_model("llama", 4, 2)
    engine = make_engine(model)
    rng = np.random.default_rng(6)
    documents = [engine.add(random_tokens(rng, n)) for n in (20, 30)]
    calls = {"seg_paged_attention": 0, "write_pages": 0}

    def counting(name, op):
        def counted(*args, **kwargs):
            calls[name] += 1
            return op(*args, **kwargs)

        return counted

    for name in calls:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: pytest.fail("SDPA")
    )
    for policy in (RedKnot(), Dense()):
        calls.update(seg_paged_attention=0, write_pages=0)
        engine.prefill(documents, random_tokens(rng, 3), policy=policy)
        assert calls == {"seg_paged_attention": 3, "write_pages": 3}


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_rope_is_refused(rope_type):
    model = tiny_model("llama", 4, 2)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": rope_type}
    with pytest.raises(ModelError, match=rope_type):
        make_engine(model)
