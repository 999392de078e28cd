"""Whole prefills of an N-layer slice of a named model with random weights: TTFT per policy.

The operating point: 15 % of the KV heads global, sink 128, window 1024, FFN dense in layer 0 and
for a fifth of the importance after it, 16 documents; the lm_head runs for the last row alone in
every run. Random weights tell nothing about quality, only about time, FLOPs and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from redknot.engine import Engine
from redknot.eval.bench.options import Options
from redknot.eval.bench.paged_inputs import fill_random
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row
from redknot.eval.bench.timing import Timing, ratio
from redknot.eval.memory import peak_memory
from redknot.eval.peers import hugging_face_dense
from redknot.heads import HeadMap
from redknot.recovery import Dense, LiveSpan, ModelShape, Naive, Policy, RedKnot

__all__ = ["random_model", "run", "spread_heads"]

_GLOBAL_FRACTION, _WINDOW, _SINK = 0.15, 1024, 128
_DOCUMENTS, _QUESTION_TOKENS, _NEW_TOKENS = 16, 64, 8
# Long prompts keep a copy of every document, prompt and dense rerun in the pool.
_POOL_COPIES = 3


def policies() -> list[tuple[str, Policy]]:
    """Policies that are compared, by name; the first is our own dense prefill."""
    return [
        ("dense", Dense()),
        ("naive", Naive()),
        ("redknot", RedKnot(dense_until=1, ffn_mass=0.2)),
        ("live_span", LiveSpan()),
    ]


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Measure every context."""
    rows = []
    contexts = options.contexts or ((1024,) if options.quick else (8192, 16384))
    for name, shape in options.shapes("Llama-3-8B").items():
        layers = options.layers or (2 if options.quick else 4)
        options.progress(f"ttft {name}: {layers} layers of random weights")
        model = random_model(shape, layers, options)
        for context in contexts:
            rows += _measure(name, model, shape, layers, context, options, roofs)
    return rows


def random_model(shape: ModelShape, num_layers: int, options: Options) -> Any:
    """The first layers of a Llama of this shape, with random weights and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(options.torch_dtype).to_empty(device=options.device).eval()
    model.tie_weights()
    for number, (name, weight) in enumerate(model.named_parameters()):
        with torch.no_grad():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                scale = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                fill_random(weight.data, scale=scale, seed=number)
    dim = shape.head_dim
    inv_freq = 500_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    rotary = model.model.rotary_emb
    rotary.inv_freq = inv_freq.to(options.device)
    if hasattr(rotary, "original_inv_freq"):
        rotary.original_inv_freq = rotary.inv_freq
    return model


def spread_heads(num_layers: int, num_kv_heads: int) -> HeadMap:
    """15 % of all KV heads global, spread over the layers."""
    total = num_layers * num_kv_heads
    chosen = np.linspace(0, total, max(1, round(_GLOBAL_FRACTION * total)), endpoint=False)
    classes = np.full(total, "local", dtype=object)
    # A step that is no divisor of the heads per layer would pick the same head everywhere.
    classes[np.unique(chosen.astype(int))] = "global"
    return HeadMap(classes.reshape(num_layers, num_kv_heads).tolist(), window=_WINDOW, sink=_SINK)


def _measure(
    name: str,
    model: Any,
    shape: ModelShape,
    layers: int,
    context: int,
    options: Options,
    roofs: Roofs,
) -> list[Row]:
    heads = spread_heads(layers, shape.num_kv_heads)
    itemsize = options.torch_dtype.itemsize
    kv_bytes = 2 * layers * shape.num_kv_heads * shape.head_dim * itemsize * context
    engine = Engine(
        model,
        heads,
        policy=LiveSpan(),  # whose hidden states are stored with the documents
        kv_budget=_POOL_COPIES * kv_bytes + (64 << 20),
        chat=False,
    )
    rng = np.random.default_rng(0)
    # Prefix (BOS), documents and question make `context` tokens together.
    body = context - 1 - _QUESTION_TOKENS
    lengths = np.diff(np.linspace(0, body, _DOCUMENTS + 1).astype(int))
    options.progress(f"ttft {name} {context}: caching {_DOCUMENTS} documents")
    documents = [engine.add(rng.integers(0, shape.vocab_size, int(n))) for n in lengths]
    question = rng.integers(0, shape.vocab_size, _QUESTION_TOKENS)
    token_ids = engine.prefill(documents, question, policy=Naive()).token_ids

    def ours(policy: Policy) -> Callable[[], Any]:
        return lambda: engine.generate(
            documents, question, policy=policy, max_new_tokens=_NEW_TOKENS
        )

    ways = {policy_name: ours(policy) for policy_name, policy in policies()}
    if options.wants("huggingface"):
        ways["Hugging Face"] = lambda: hugging_face_dense(model, token_ids, _NEW_TOKENS)
    results: dict[str, list[Any]] = {way: [] for way in ways}
    peaks: dict[str, list[int]] = {way: [] for way in ways}
    rounds = 3
    for number in range(rounds):
        for way, work in ways.items():
            options.progress(f"ttft {name} {context}: {way}, {number + 1} of {rounds}")
            with peak_memory(torch.device(options.device)) as peak:
                results[way].append(work())
            if peak.bytes is not None:
                peaks[way].append(peak.bytes)
    return _rows(name, shape, layers, context, results, peaks, roofs, heads.global_fraction)


def _rows(
    name: str,
    shape: ModelShape,
    layers: int,
    context: int,
    results: dict[str, list[Any]],
    peaks: dict[str, list[int]],
    roofs: Roofs,
    global_fraction: float,
) -> list[Row]:
    times = {way: Timing(tuple(r.ttft_seconds for r in runs)) for way, runs in results.items()}
    dense_flops = results["dense"][0].ledger.flops
    rows = []
    for way, runs in results.items():
        own = times[way]
        flops = runs[0].ledger.flops if way != "Hugging Face" else dense_flops
        peers = {
            f"{peer}": ratio(own, times[peer])
            for peer in ("dense", "Hugging Face")
            if peer in times and peer != way
        }
        ratios = {peer: value for peer, value in peers.items() if value is not None}
        details: dict[str, Any] = {
            "model": name,
            "layers": layers,
            "context": context,
            "policy": way,
            "global_fraction": global_fraction,
            "flops": flops,
            "flops_ratio": dense_flops / flops,
            "ms_per_output_token": 1e3 * median(run.seconds_per_token for run in runs),
            "peak_bytes": int(median(peaks[way])) if peaks[way] else None,
            "samples": len(runs),
        }
        if "dense" in ratios:
            details["ttft_ratio_over_flops_ratio"] = ratios["dense"] / details["flops_ratio"]
        rows.append(
            Row(
                kind="ttft",
                heads="mixed" if way not in ("dense", "Hugging Face") else "global",
                shape=f"{name} x {layers} layers, {context}: {way}",
                time_ms=1e3 * own.median,
                spread_ms=1e3 * own.spread,
                tflops=flops / own.median / 1e12,
                roof_fraction=flops / own.median / 1e12 / roofs.compute_tflops,
                bound="compute",
                ratios=ratios,
                peers_ms={peer: 1e3 * times[peer].median for peer in peers},
                details=details,
            )
        )
    return rows
