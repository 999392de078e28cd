"""Options that are none: one error in the caller's words, before anything is changed."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model

from redknot import (
    BudgetError,
    Engine,
    GenerationRequest,
    HeadMap,
    HeadMapError,
    InputError,
    ModelError,
    SegPagedCache,
    SparseFFN,
    attach,
)
from redknot.engine import Sampling

pytestmark = pytest.mark.transformers

HEADS = HeadMap.all_global(3, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", 4, 2)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, HEADS, kv_budget="1MiB", page_size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an int of at least 1, got 1.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be an int of at least 1, got '3'"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int of at least 1, got True"),
        ({"temperature": math.nan}, "temperature must be a number >= 0, got nan"),
        ({"temperature": "1"}, "temperature must be a number >= 0, got '1'"),
        ({"top_k": 1.5}, "top_k must be an int of at least 1, got 1.5"),
        ({"top_p": "x"}, "top_p must be in (0, 1], got 'x'"),
        ({"seed": 1.5}, "seed must be an int of at least 0, got 1.5"),
        ({"stop": 5}, "stop must be text or a list of texts, got 5"),
        ({"stop": [5]}, "a stop string must be text and not empty, got 5"),
        ({"documents": None}, "documents must be a list of ids, got None"),
        ({"policy": "redknot"}, "policy must be one such as redknot.RedKnot(), got 'redknot'"),
    ],
)
def test_generate(engine, options, message):
    before = engine.session_stats(), engine.kv_stats()
    arguments = {"documents": [], "question": [3, 4], "max_new_tokens": 2} | options
    with pytest.raises(InputError) as error:
        engine.generate(arguments.pop("documents"), arguments.pop("question"), **arguments)
    assert str(error.value) == message
    assert (engine.session_stats(), engine.kv_stats()) == before


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (None, "requests must be a list of GenerationRequest, got None"),
        ([5], "a request must be a GenerationRequest, got 5"),
        (GenerationRequest([], [3]), "requests must be a list of GenerationRequest, got Gen"),
    ],
)
def test_run(engine, requests, message):
    with pytest.raises(InputError) as error:
        engine.run(requests)
    assert str(error.value).startswith(message)


def test_one_question_is_no_list_of_them(engine):
    with pytest.raises(InputError, match=r"^questions must be a list of questions, got 'When'$"):
        engine.generate_shared([], "When")


def test_a_callback_that_is_none(engine):
    before = engine.session_stats()
    with pytest.raises(InputError, match=r"^on_text must be callable, got 5$"):
        engine.generate([], [3], max_new_tokens=2, on_text=5)
    assert engine.session_stats() == before


def test_a_fork_that_is_sampled_by_nothing(engine):
    (session,) = engine.submit(GenerationRequest([], [3, 4], 4))
    before = engine.kv_stats(), engine.session_stats()
    with pytest.raises(InputError, match=r"^sampling must be a Sampling, got 0.5$"):
        session.fork(0.5)
    assert (engine.kv_stats(), engine.session_stats()) == before
    session.cancel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an int of at least 1, got 0"),
        ({"reserve": 1.5}, "reserve must be in [0, 1], got 1.5"),
        ({"sampling": 0.5}, "sampling must be a Sampling, got 0.5"),
        ({"policy": 5}, "policy must be one such as redknot.RedKnot(), got 5"),
    ],
)
def test_a_request(options, message):
    with pytest.raises(InputError) as error:
        GenerationRequest([], [3], **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": "16"}, "page_size must be an int of at least 1, got '16'"),
        ({"kv_budget": []}, "kv_budget must be bytes or a text such as '8GiB', got []"),
        ({"kv_budget": math.nan}, "kv_budget must be bytes or a text such as '8GiB', got nan"),
        ({"store": 5}, "a store is given by its URL, such as 'lmdb:///path', got 5"),
        ({"salt": None}, "salt must be text, got None"),
        ({"separator": 5}, "separator must be text, got 5"),
        ({"tokenizer": "path"}, "tokenizer must be one of transformers, got 'path'"),
        ({"heads": 5}, "a head map is read from a file, got 5"),
    ],
)
def test_an_engine(model, options, message):
    options = {"heads": HEADS, "kv_budget": "1MiB", "page_size": 16} | options
    with pytest.raises((InputError, HeadMapError)) as error:
        Engine(model, **options)
    assert str(error.value) == message


def test_a_pool_larger_than_the_memory(model):
    with pytest.raises(BudgetError, match=r"^cpu has no .* bytes for a pool of .* pages$"):
        Engine(model, HEADS, kv_budget="9000000TiB", page_size=4096)


@pytest.mark.parametrize("question", [[3, 4], [3] * 40])
def test_weights_that_are_no_numbers(question):
    model = tiny_model("llama", 4, 2)
    engine = Engine(model, HEADS, kv_budget="1MiB", page_size=16)
    document = engine.add([5] * 20)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    before = engine.kv_stats()
    with pytest.raises(ModelError, match="the model's logits are NaN: one of its weights is"):
        engine.generate([document], question, max_new_tokens=3)
    assert engine.kv_stats()["num_sessions"] == before["num_sessions"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "map.json"}, "heads must be a HeadMap, got str"),
        ({"prefill_chunk_size": 1.5}, "prefill_chunk_size must be an int of at least 1, got 1.5"),
        ({"page_size": True}, "page_size must be an int of at least 1, got True"),
    ],
)
def test_attach(model, options, message):
    before = model.config._attn_implementation
    with pytest.raises(InputError) as error:
        attach(model, **{"heads": HEADS} | options)
    assert str(error.value) == message
    assert model.config._attn_implementation == before


def test_a_cache(model):
    with pytest.raises(InputError, match=r"^heads must be a HeadMap, got NoneType$"):
        SegPagedCache(model.config, None)


@pytest.mark.parametrize(("option", "value"), [("mass", "x"), ("mass", None), ("min_keep", None)])
def test_a_sparse_ffn(option, value):
    with pytest.raises(InputError, match=f"^SparseFFN: {option} must be "):
        SparseFFN(**{option: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HEADS.kv_bytes(-1, head_dim=64, bytes_per_element=2), "context .* 0, got -1"),
        (lambda: HEADS.kv_bytes(9, head_dim=0, bytes_per_element=2), "head_dim .* 1, got 0"),
        (
            lambda: HEADS.kv_bytes_full(9, head_dim=8, bytes_per_element=2, page_size=0),
            "page_size .* 1, got 0",
        ),
        (lambda: HEADS.attention_pairs(1.5), "context .* 0, got 1.5"),
        (lambda: HEADS.rules([None, 0, 4]), "sliding_window .* 1, got 0"),
        (lambda: HEADS.slice_heads(0, 0), "world_size .* 1, got 0"),
        (lambda: HEADS.slice_heads("0", 2), "rank must be between 0 and 1, got '0'"),
        (lambda: HeadMap.prefix_compression(4, 2, layers=2), "layers must be a list .* got 2"),
        (lambda: HeadMap([["global"]], metadata=5), "metadata must be a mapping, got 5"),
    ],
)
def test_a_head_map(call, message):
    with pytest.raises(HeadMapError, match=f"^{message}"):
        call()


def test_numbers_that_are_sampling():
    Sampling(temperature=1, top_k=1, top_p=1, seed=0)
    with pytest.raises(InputError, match="temperature must be a number >= 0, got inf"):
        Sampling(temperature=math.inf)
