"""Tiny random models of every family, and what redknot's attention must equal, in plain torch."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from tiny_models import GEMMA2
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface

VOCAB = 101
NUM_LAYERS = 3

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "max_position_embeddings": 1024,
    "head_dim": 32,
    "initializer_range": 0.15,  # far from uniform, so that greedy choices are not ties
}
# Sliding windows are smaller than the prompts of the tests.
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3-sliding": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA2),
}
# Query heads, KV heads: groups of 1, 4 and 8.
GROUPS = {1: (2, 2), 4: (8, 2), 8: (8, 1)}


def tiny_model(family="llama", group=4, *, dtype=torch.float32, seed=0, **changes):
    """A model in eval mode that never stops by itself."""
    model_class, config_class, extra = FAMILIES[family]
    num_q_heads, num_kv_heads = GROUPS[group]
    config = config_class(
        **{
            **_SHAPE,
            **extra,
            "num_attention_heads": num_q_heads,
            "num_key_value_heads": num_kv_heads,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    if family == "gemma2":
        model.set_attn_implementation("eager")  # SDPA, the default of 5.16, ignores the caps
    return model


def prompt(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def greedy(model, ids, max_new_tokens, **options):
    return model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, **options)


def assert_close(ours, reference, tolerance=1e-4):
    """Largest difference relative to the largest logit."""
    assert not torch.isnan(ours).any()
    difference = (ours.float() - reference.float()).abs().max() / reference.abs().max()
    assert difference <= tolerance, f"{difference:.2e} > {tolerance:.2e}"


# --- the reference: a dense mask per head, from the visibility rule ------------------------------


def _reference_attention(module, query, key, value, mask, scaling, softcap=None, **_):
    windows, sinks, since = _RULES[id(module.config)]
    batch, num_q_heads, length = query.shape[:3]
    assert key.shape[2] == length, "the reference runs without a cache"
    group = num_q_heads // key.shape[1]
    is_token = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    position = is_token.cumsum(1) - 1
    i, j = position[:, None, :, None], position[:, None, None, :]
    window = torch.tensor(windows[module.layer_idx]).repeat_interleave(group)[None, :, None, None]
    sink = torch.tensor(sinks[module.layer_idx]).repeat_interleave(group)[None, :, None, None]
    visible = (j <= i) & ((window < 0) | (j < sink) | (j > i - window) | (i < since))
    visible = visible & is_token[:, None, None, :] & is_token[:, None, :, None]
    key, value = (x.repeat_interleave(group, dim=1).float() for x in (key, value))
    scores = query.float() @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    out = torch.nan_to_num(weights) @ value  # a pad sees nothing
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


_RULES = {}


@contextmanager
def reference_rules(model, windows, sinks, since=0):
    """Let a model run without cache under windows and sinks [num_layers][num_kv_heads].

    Queries before position `since` see everything.
    """
    AttentionInterface.register("dense_reference", _reference_attention)
    AttentionMaskInterface.register(
        "dense_reference", lambda *_, attention_mask=None, **__: attention_mask
    )
    _RULES[id(model.config)] = (windows, sinks, since)
    before = model.config._attn_implementation
    model.set_attn_implementation("dense_reference")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del _RULES[id(model.config)]


def assert_greedy(model, tokens, prompt_length, rules, attention_mask=None):
    """Assert that each token behind the prompt is the reference's choice, given those before it."""
    num_new = tokens.shape[1] - prompt_length
    if attention_mask is None:
        attention_mask = torch.ones(len(tokens), prompt_length, dtype=torch.long)
    mask = torch.nn.functional.pad(attention_mask, (0, num_new), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with reference_rules(model, *rules):
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.equal(logits[:, prompt_length - 1 : -1].argmax(-1), tokens[:, prompt_length:])


def native_rules(heads, model):
    """The rules of a head map inside a model's sliding windows, by the test's own reading."""
    config = model.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * NUM_LAYERS
    if config.model_type == "mistral":
        types = ["sliding_attention"] * NUM_LAYERS
    windows, sinks = heads.windows.tolist(), heads.sinks.tolist()
    for layer, kind in enumerate(types):
        if kind != "sliding_attention":
            continue
        native = config.sliding_window
        for head in range(heads.num_kv_heads):
            window = windows[layer][head]
            if window < 0 or window >= native:
                windows[layer][head], sinks[layer][head] = native, 0
    return windows, sinks
