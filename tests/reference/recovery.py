"""What a recovery must compute, in the plainest torch: whole matrices, one mask per head, no pages.

Works on a Hugging Face Llama-layout model in fp32 (Llama, Mistral, Qwen2, Qwen3). Keys are kept
before rotation and rotated at true positions, which is what realignment must amount to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Rules:
    """Per (layer, head): is_global, window, sink; and the relaxations of the policy."""

    is_global: list[list[bool]]
    window: list[list[int]]
    sink: list[list[int]]
    boundary_rows: int = 0
    dense_until: int = 0
    ffn_mass: float = 1.0
    recent_n: int = 0
    keep: dict[int, Tensor] = field(default_factory=dict)  # rows whose FFN ran, by layer


def _rotate(model, x: Tensor, positions: Tensor) -> Tensor:
    """x [heads, tokens, dim] rotated at positions, as the model itself would."""
    cos, sin = model.model.rotary_emb(x[None], positions[None])
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _project(model, layer: int, normed: Tensor):
    attention = model.model.layers[layer].self_attn
    dim = attention.head_dim
    q, k, v = (
        p(normed).view(len(normed), -1, dim)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def _visible(length: int, is_global: bool, window: int, sink: int, native: int | None) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = j <= i
    if not is_global:
        if native is not None and window >= native:
            window, sink = native, 0
        return mask & ((j < sink) | (j > i - window))
    return mask if native is None else mask & (j > i - native)


def _native_window(model, layer: int) -> int | None:
    config = model.config
    if config.model_type == "mistral":
        return config.sliding_window
    if config.model_type.startswith("qwen"):
        sliding = config.layer_types[layer] == "sliding_attention"
        return config.sliding_window if sliding else None
    return None


@torch.no_grad()
def offline(model, prefix: list[int], document: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Unrotated K and V [heads, tokens, dim] of a document computed densely behind the prefix."""
    ids = torch.tensor(prefix + document)
    length = len(ids)
    hidden, cached = model.model.embed_tokens(ids), []
    for layer, block in enumerate(model.model.layers):
        q, k, v = _project(model, layer, block.input_layernorm(hidden))
        cached.append((k[:, len(prefix) :], v[:, len(prefix) :]))
        mask = _visible(length, True, -1, 0, _native_window(model, layer))
        masks = mask.expand(k.shape[0], -1, -1)
        hidden = hidden + _attend(model, layer, q, k, v, masks, torch.arange(length))[0]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return cached


def _attend(model, layer, q, k, v, masks, positions):
    """(O projection, output before it [tokens, heads * dim]); masks [kv_heads, tokens, tokens]."""
    attention = model.model.layers[layer].self_attn
    group = q.shape[0] // k.shape[0]
    q, k = _rotate(model, q, positions), _rotate(model, k, positions)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * attention.scaling
    scores = scores.masked_fill(~masks.repeat_interleave(group, 0), float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return attention.o_proj(out), out


@torch.no_grad()
def recover(model, prefix, documents, query, cached, rules: Rules, *, live: bool) -> Tensor:
    """Last-token logits. `cached[i]` is `offline` of document i; documents in prompt order.

    live=False: naive reuse. live=True: every row of every document but the first is recomputed
    (the first is at home), global heads take the new K/V, local heads keep the cached ones.
    """
    ids = torch.tensor(prefix + [t for d in documents for t in d] + query)
    length, query_begin = len(ids), len(ids) - len(query)
    kept = [offline(model, [], prefix)] if prefix else []
    kept += cached
    old = [
        [torch.cat([part[layer][kind] for part in kept], 1) for kind in (0, 1)]
        for layer in range(model.config.num_hidden_layers)
    ]
    starts, position = [], len(prefix)
    for document in documents:
        starts.append(position)
        position += len(document)
    moved = [
        (begin, begin + len(document))
        for begin, document in list(zip(starts, documents, strict=True))[1:]
    ]
    row_live = torch.zeros(length, dtype=torch.bool)
    row_live[query_begin:] = True
    fresh_local = row_live.clone()
    recent = row_live.clone()
    if live:
        for begin, end in moved:
            row_live[begin:end] = True
            fresh_local[begin : min(begin + rules.boundary_rows, end)] = True
            recent[max(begin, end - rules.recent_n) : end] = True
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(length)
    for layer, block in enumerate(model.model.layers):
        q, k, v = _project(model, layer, block.input_layernorm(hidden))
        masks = []
        for head in range(k.shape[0]):
            is_global = rules.is_global[layer][head]
            stale = ~(row_live if is_global else fresh_local)[:query_begin]
            for new, cache in ((k, old[layer][0]), (v, old[layer][1])):
                new[head, :query_begin][stale] = cache[head][stale]
            masks.append(
                _visible(
                    length,
                    is_global,
                    rules.window[layer][head],
                    rules.sink[layer][head],
                    _native_window(model, layer),
                )
            )
        added, out = _attend(model, layer, q, k, v, torch.stack(masks), positions)
        hidden = hidden + added
        chosen = row_live.clone()
        if layer >= rules.dense_until and rules.ffn_mass < 1:
            importance = out.norm(dim=-1).double() * row_live
            order = importance.argsort(descending=True, stable=True)
            mass = importance[order].cumsum(0) / importance.sum()
            count = int((mass < rules.ffn_mass).sum()) + 1
            chosen = torch.zeros(length, dtype=torch.bool)
            chosen[order[:count]] = True
            chosen |= recent
            chosen &= row_live
        rules.keep[layer] = chosen
        hidden = torch.where(
            chosen[:, None], hidden + block.mlp(block.post_attention_layernorm(hidden)), hidden
        )
    return model.lm_head(model.model.norm(hidden[-1]))
