"""What a recovery must compute, in the plainest torch: whole matrices, one mask per head, no pages.

Works on a Hugging Face Llama-layout model in fp32 (Llama, Mistral, Qwen2, Qwen3). Keys are kept
before rotation and rotated at true positions, which is what realignment must amount to. Every row
of the prompt is carried through every layer, and rows that a policy lets die or enter are masked:
what they compute is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor


@dataclass
class Rules:
    """Per (layer, head): is_global, window, sink; and what the policy does."""

    is_global: list[list[bool]]
    window: list[list[int]]
    sink: list[list[int]]
    policy: str = "redknot"  # naive, redknot, epic, cacheblend, live_span
    boundary_rows: int = 0
    dense_until: int = 0
    ffn_mass: float = 1.0
    ffn_signal: str = "attention_norm"
    recent_n: int = 0
    first_rows: int = 0  # epic
    ratio: float = 1.0  # cacheblend
    pick_layer: int = 1  # cacheblend
    row_fraction: float = 1.0  # live_span
    signal: str = "foreign"  # live_span
    early_fraction: float = 0.0  # live_span
    read_fraction: float = 0.0  # live_span
    refresh_local: bool = True  # live_span
    probed: dict[int, list[int]] = field(
        default_factory=dict
    )  # live_span: heads that pick, by layer
    edge_rows: int = 0  # live_span
    first_layer: int | None = None  # live_span: not the first with a global head
    rows: list[int] | None = None  # live_span: instead of a pick, these and the edge
    keep: dict[int, Tensor] = field(default_factory=dict)  # rows whose FFN ran, by layer
    lived: dict[int, Tensor] = field(default_factory=dict)  # rows that attended, by layer


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


@dataclass
class Cached:
    """A document computed alone: per layer unrotated K, V [heads, tokens, dim], input hidden."""

    kv: list[tuple[Tensor, Tensor]]
    hidden: list[Tensor]


@torch.no_grad()
def offline(model, prefix: list[int], document: list[int]) -> Cached:
    """A document computed densely behind the prefix."""
    ids = torch.tensor(prefix + document)
    length, begin = len(ids), len(prefix)
    hidden, cached = model.model.embed_tokens(ids), Cached([], [])
    for layer, block in enumerate(model.model.layers):
        cached.hidden.append(hidden[begin:])
        q, k, v = _project(model, layer, block.input_layernorm(hidden))
        cached.kv.append((k[:, begin:], v[:, begin:]))
        mask = _visible(length, True, -1, 0, _native_window(model, layer))
        masks = mask.expand(k.shape[0], -1, -1)
        hidden = hidden + _attend(model, layer, q, k, v, masks, torch.arange(length))[0]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return cached


def _weights(model, layer, q, k, masks, positions) -> Tensor:
    """Softmax of the scores [q_heads, tokens, tokens]; masks [kv_heads, tokens, tokens]."""
    group = q.shape[0] // k.shape[0]
    q, k = _rotate(model, q, positions), _rotate(model, k, positions)
    scaling = model.model.layers[layer].self_attn.scaling
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scaling
    return scores.masked_fill(~masks.repeat_interleave(group, 0), float("-inf")).softmax(-1)


def _attend(model, layer, q, k, v, masks, positions):
    """(O projection, output before it [tokens, heads * dim]); masks [kv_heads, tokens, tokens]."""
    weights = _weights(model, layer, q, k, masks, positions)
    out = (weights @ v.repeat_interleave(q.shape[0] // k.shape[0], 0)).transpose(0, 1).flatten(1)
    return model.model.layers[layer].self_attn.o_proj(out), out


def _top(importance: Tensor, count: int, among: Tensor) -> Tensor:
    """Mask of the `count` most important rows of the mask `among`."""
    chosen = torch.zeros_like(among)
    score = torch.where(among, importance, float("-inf"))
    chosen[score.argsort(descending=True, stable=True)[: min(count, int(among.sum()))]] = True
    return chosen


def _holding(importance: Tensor, mass: float) -> Tensor:
    """Mask of the smallest set of rows that holds `mass` of the importance."""
    order = importance.argsort(descending=True, stable=True)
    share = importance[order].cumsum(0) / importance.sum()
    chosen = torch.zeros(len(importance), dtype=torch.bool)
    chosen[order[: int((share < mass).sum()) + 1]] = True
    return chosen


@torch.no_grad()
def recover(model, prefix, documents, query, cached: list[Cached], rules: Rules) -> Tensor:
    """Last-token logits. `cached[i]` is `offline` of document i; documents in prompt order.

    The first document is at home, so its rows never live.
    """
    ids = torch.tensor(prefix + [t for d in documents for t in d] + query)
    length, query_begin = len(ids), len(ids) - len(query)
    num_layers, positions = model.config.num_hidden_layers, torch.arange(length)
    kept = ([offline(model, [], prefix)] if prefix else []) + cached
    old = [
        [torch.cat([part.kv[layer][kind] for part in kept], 1) for kind in (0, 1)]
        for layer in range(num_layers)
    ]
    # What is old to a row: the prefix, and its own segment (0: prefix, then the documents).
    segment = torch.tensor(
        [0] * len(prefix)
        + [n for n, document in enumerate(documents, 1) for _ in document]
        + [len(documents) + 1] * len(query)
    )
    foreign_key = (segment[None] != segment[:, None]) & (segment[None] != 0)

    is_query = positions >= query_begin
    moved, place = torch.zeros_like(is_query), torch.zeros_like(positions)
    last = torch.zeros_like(is_query)
    for n, document in enumerate(documents, 1):
        place[segment == n] = torch.arange(len(document))
        moved |= (segment == n) & (n > 1)
        last |= (segment == n) & (place >= len(document) - rules.recent_n) & (n > 1)

    def first(count: int) -> Tensor:
        return moved & (place < count)

    with_globals = [layer for layer in range(num_layers) if any(rules.is_global[layer])]
    begin, end = (with_globals[0], with_globals[-1]) if with_globals else (num_layers, -1)
    if rules.first_layer is not None:
        begin = rules.first_layer
    edge = first(max(rules.edge_rows, rules.boundary_rows))
    picked = moved  # what the pick left
    if rules.rows is not None:
        picked = edge | torch.isin(positions, torch.tensor(rules.rows, dtype=torch.long))

    def most_important(
        layer: int, q, k, v, keep: float, kept: Tensor, reads: float = 0.0
    ) -> Tensor:
        """Rows that a live span keeps by the heads of a layer, `kept` and those read included."""
        group, heads = q.shape[0] // k.shape[0], rules.probed.get(layer)
        asked = [
            h for h in range(q.shape[0])
            if rules.is_global[layer][h // group] and (heads is None or h // group in heads)
        ]  # fmt: skip
        everything = _visible(length, True, -1, 0, _native_window(model, layer))
        weights = _weights(model, layer, q, k, everything.expand(k.shape[0], -1, -1), positions)
        weights, values = weights[asked], v.repeat_interleave(group, 0)[asked]
        seen = weights * foreign_key if rules.signal == "foreign" else weights
        signal = (seen @ values).double().square().sum((0, 2)).sqrt()
        total = int(moved.sum())
        best = _top(signal, ceil(keep * total), moved & ~kept)
        kept, read = kept | best, weights[:, best].double().sum((0, 1))
        return kept | _top(read, ceil(reads * total), moved & ~kept)

    spans = rules.policy == "live_span" and rules.rows is None and begin < end
    drops = ceil(rules.row_fraction * int(moved.sum())) < int((moved & ~edge).sum())
    # Rows are computed from the embeddings on where weaker global heads come before the span.
    ahead = rules.policy == "live_span" and begin < end and any(map(any, rules.is_global[:begin]))
    if ahead and spans and drops:
        stored = torch.cat([part.hidden[begin] for part in kept])
        nowhere = torch.zeros(len(query), stored.shape[1])
        q, *_ = _project(
            model, begin, model.model.layers[begin].input_layernorm(torch.cat([stored, nowhere]))
        )
        k, v = (
            torch.cat([x, torch.zeros_like(q[: x.shape[0], query_begin:])], 1) for x in old[begin]
        )
        picked = most_important(begin, q, k, v, rules.row_fraction, edge, rules.read_fraction)
    start = 0 if ahead else begin
    brought = torch.zeros(length, dtype=torch.float64)  # from other segments, so far

    hidden = model.model.embed_tokens(ids)
    for layer, block in enumerate(model.model.layers):
        nothing, boundary = torch.zeros_like(moved), first(rules.boundary_rows)
        if rules.policy == "live_span" and layer == start and not ahead:
            stored = torch.cat([hidden[: len(prefix)], *(c.hidden[layer] for c in cached)])
            enters = picked & ~edge
            hidden = torch.where(enters[:, None], torch.cat([stored, hidden[query_begin:]]), hidden)
        q, k, v = _project(model, layer, block.input_layernorm(hidden))
        # Fresh in global heads, fresh in local heads, live behind the projections.
        carried = picked if layer > start else edge
        fresh, fresh_local, live = {
            "naive": (nothing, nothing, nothing),
            "redknot": (moved, boundary, moved),
            "epic": (first(rules.first_rows),) * 3,
            "cacheblend": (picked,) * 3,
            "live_span": (
                boundary if layer > end else carried,
                carried if rules.refresh_local and layer < end else boundary,
                boundary if layer >= end else picked if layer >= start else edge,
            ),
        }[rules.policy]
        if rules.policy == "cacheblend" and layer == rules.pick_layer:
            shift = sum(
                (new[:, :query_begin] - cache).square().sum((0, 2))
                for new, cache in ((k, old[layer][0]), (v, old[layer][1]))
            )
            shift = torch.cat([shift, torch.zeros(len(query))])
            live = picked = _top(shift, ceil(rules.ratio * int(moved.sum())), moved)
        masks = []
        for head in range(k.shape[0]):
            is_global = rules.is_global[layer][head]
            stale = ~(fresh if is_global else fresh_local)[:query_begin]
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
        masks = torch.stack(masks)
        added, out = _attend(model, layer, q, k, v, masks, positions)
        group = q.shape[0] // k.shape[0]
        is_global = torch.tensor(rules.is_global[layer]).repeat_interleave(group)
        weights = _weights(model, layer, q, k, masks, positions)[is_global]
        values = v.repeat_interleave(group, 0)[is_global]
        other = ((weights * foreign_key) @ values).double().square().sum((0, 2)).sqrt()
        if spans and drops and ahead and layer == 0 and any(rules.is_global[0]):
            live = picked = most_important(0, q, k, v, rules.early_fraction, picked)
        if spans and drops and not ahead and layer == begin:
            live = picked = most_important(
                layer, q, k, v, rules.row_fraction, edge, rules.read_fraction
            )
        live = live | is_query
        rules.lived[layer] = live
        hidden = hidden + added
        chosen = live
        brought += torch.where(live & ~is_query, other, 0.0)
        importance = out.norm(dim=-1).double() if rules.ffn_signal == "attention_norm" else brought
        thins = layer >= rules.dense_until and rules.ffn_mass < 1
        if rules.policy == "live_span" and layer < start:
            thins = False  # the few rows before the span are all computed
        if thins and (importance * live).any():
            always = is_query | last | (edge if rules.policy == "live_span" else nothing)
            chosen = (_holding(importance * live, rules.ffn_mass) | always) & live
        rules.keep[layer] = chosen
        hidden = torch.where(
            chosen[:, None], hidden + block.mlp(block.post_attention_layernorm(hidden)), hidden
        )
    return model.lm_head(model.model.norm(hidden[-1]))
