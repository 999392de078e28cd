"""Hidden states that the offline pass stores beside a document's K and V."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

from redknot import Engine
from redknot.store import stored_parts

pytestmark = pytest.mark.transformers

MODELS = {
    "llama": ("llama", 4, 2, {}),
    "mistral": ("mistral", 4, 2, {"sliding_window": 8}),
    "qwen3": ("qwen3", 8, 2, {}),
}


def make(name="llama", **options):
    family, q_heads, kv_heads, model_options = MODELS[name]
    model = tiny_model(family, q_heads, kv_heads, **model_options)
    return model, Engine(model, kv_budget="8MiB", page_size=16, prefix=[1, 9, 4], **options)


@pytest.mark.parametrize("behind_prefix", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_they_are_the_models_own(name, behind_prefix, layer):
    model, engine = make(name, behind_prefix=behind_prefix)
    tokens = random_tokens(np.random.default_rng(0), 21)
    segment = engine.documents.find(engine.add(tokens), hidden_layer=layer).segment
    context = [1, 9, 4] if behind_prefix else []
    with torch.no_grad():
        out = model(torch.tensor([context + tokens]), output_hidden_states=True)
    expected = out.hidden_states[layer][0, len(context) :]
    assert segment.hidden is not None and segment.hidden_layer == layer
    assert (segment.hidden - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_document_cached_without_them_keeps_its_pages():
    _, engine = make()
    document = engine.add(random_tokens(np.random.default_rng(1), 21))
    plain, pages = engine.documents.find(document).segment, engine.kv_stats()
    found = engine.documents.find(document, hidden_layer=1)
    assert plain.hidden is None and found.segment.hidden is not None
    assert found.computed and "cached without hidden states of layer 1" in found.reason
    assert found.segment.handle == plain.handle and engine.kv_stats() == pages
    assert found.segment.key != plain.key and plain.key not in engine.documents.store
    assert found.segment.offline_flops > plain.offline_flops
    again = engine.documents.find(document)  # whoever wants no hidden states may find them
    assert not again.computed and again.segment is found.segment
    assert engine.documents.is_cached(document)
    engine.clear()
    assert engine.kv_stats()["num_free_pages"] == pages["num_pages"]


def test_the_same_layer_is_found_and_another_is_computed():
    _, engine = make()
    document = engine.add(random_tokens(np.random.default_rng(2), 21))
    first = engine.documents.find(document, hidden_layer=1)
    assert engine.documents.find(document, hidden_layer=1).segment is first.segment
    other = engine.documents.find(document, hidden_layer=2)
    assert other.computed and other.segment.hidden_layer == 2
    assert len({stored_parts(None), stored_parts(1), stored_parts(2)}) == 3
