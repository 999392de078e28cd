"""Sparse FFN as a drop-in: which tokens run, that the model's own modules do the work."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import NUM_LAYERS, assert_close, greedy, prompt, tiny_model
from torch import nn

from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.models.attach import attach
from redknot.models.sparse_ffn import SparseFFN, SparseMLP

pytestmark = pytest.mark.transformers

HEADS = HeadMap.all_global(NUM_LAYERS, 2)


class Adapted(nn.Module):
    """A Linear with a low-rank adapter that counts its rows, as an adapter library would put it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.rows = []

    def forward(self, x):
        self.rows.append(x.shape[:-1].numel())
        return self.base(x) + self.up(self.down(x))


def adapt(model):
    torch.manual_seed(5)
    for block in model.model.layers:
        block.mlp.up_proj = Adapted(block.mlp.up_proj)
    return model


def rows_per_layer(model):
    return [block.mlp.up_proj.rows for block in model.model.layers]


def naive_selection(scores, mass, recent_n):
    """Indices of the smallest set that holds `mass`, and the last ones."""
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    total, kept = 0.0, set(range(max(0, len(scores) - recent_n), len(scores)))
    for t in order:
        kept.add(t)
        total += scores[t]
        if total >= mass * sum(scores):
            break
    return kept


def naive_forward(model, ids, mask, options):
    """Logits with FFNs masked by hand: everything is computed, unselected tokens are zeroed."""
    handles, scores = [], {}

    def note(layer):
        def hook(_, args):
            scores[layer] = args[0].double().norm(dim=-1)

        return hook

    def zero(layer):
        def hook(_, args, out):
            keep = torch.zeros(out.shape[:2])
            for row in range(len(ids)):
                tokens = mask[row].nonzero()[:, 0]
                chosen = naive_selection(
                    scores[layer][row, tokens].tolist(),
                    options.mass_of_layer(layer),
                    options.recent_n,
                )
                keep[row, tokens[sorted(chosen)]] = 1
            return out * keep[..., None]

        return hook

    for layer, block in enumerate(model.model.layers):
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(note(layer)))
        if options.mass_of_layer(layer) < 1:
            handles.append(block.mlp.register_forward_hook(zero(layer)))
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
@torch.no_grad()
def test_unselected_tokens_pass_unchanged(family):
    model = adapt(tiny_model(family))
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = SparseFFN(dense_until=1, mass=0.4, deep_start=2, mass_deep=0.1, recent_n=3)
    expected = naive_forward(model, ids, mask, options)
    dense = model(ids, attention_mask=mask).logits
    real = mask.bool()
    with attach(model, HEADS, sparse_ffn=options):
        logits = model(ids, attention_mask=mask).logits
        counts = [getattr(block.mlp, "last_counts", None) for block in model.model.layers]
    assert_close(logits[real], expected[real])
    assert (logits[real] - dense[real]).abs().max() > 1e-2 * dense.abs().max()
    # The Linears saw the selected tokens alone, pads not at all; layer 0 is dense.
    assert counts[0] is None and counts[1][1] == counts[2][1] == 71
    assert rows_per_layer(model)[0][-1] == 80
    for layer in (1, 2):
        assert rows_per_layer(model)[layer][-1] == counts[layer][0] < 71
    assert counts[2][0] < counts[1][0]


@torch.no_grad()
def test_decoded_tokens_always_run_and_mass_one_is_dense():
    model = adapt(tiny_model())
    ids = prompt(2, 30)
    tokens = greedy(model, ids, 8)
    with attach(model, HEADS, sparse_ffn=SparseFFN(mass=1.0)):
        assert not any(isinstance(block.mlp, SparseMLP) for block in model.model.layers)
        assert torch.equal(greedy(model, ids, 8), tokens)
    for rows in rows_per_layer(model):
        rows.clear()
    with attach(model, HEADS, sparse_ffn=SparseFFN(mass=0.2, recent_n=1)):
        greedy(model, ids, 8)
    for rows in rows_per_layer(model):
        assert rows[0] < 60 and rows[1:] == [2] * 7


def test_bad_options_are_refused():
    for options, message in [
        ({"mass": 0.0}, r"mass must be in \(0, 1\], got 0.0"),
        ({"mass_deep": 1.5, "deep_start": 1}, r"mass_deep must be in \(0, 1\], got 1.5"),
        ({"recent_n": -1}, "recent_n must be an int of at least 0, got -1"),
        ({"dense_until": 0.5}, "dense_until must be an int of at least 0, got 0.5"),
        ({"deep_start": 3}, "deep_start and mass_deep belong together"),
    ]:
        with pytest.raises(InputError, match=message):
            SparseFFN(**options)
