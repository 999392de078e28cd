"""Warm start: TTFT of a 16-document request whose documents lie in a tier, beside computing them.

The page pool is emptied before each request, so that every document has to come from somewhere:
computed anew, or read from host memory or LMDB (its file is in the system's page cache), checked
and put into pages. The model is a slice of a named one with random weights, as in `ttft`; 15 % of
the KV heads are global.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from redknot.engine import Engine
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row
from redknot.eval.bench.timing import Timing, ratio
from redknot.eval.bench.ttft import random_model, spread_heads
from redknot.recovery import ModelShape, Naive, Policy, RedKnot

__all__ = ["run"]

_DOCUMENTS, _QUESTION_TOKENS = 16, 64


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Measure every context."""
    rows = []
    contexts = options.contexts or ((2048,) if options.quick else (4096, 8192))
    for name, shape in options.shapes("Llama-3-8B").items():
        layers = options.layers or (2 if options.quick else 4)
        options.progress(f"store {name}: {layers} layers of random weights")
        model = random_model(shape, layers, options)
        for context in contexts:
            rows += _measure(name, model, shape, layers, context, options)
    return rows


def _empty(engine: Engine) -> None:
    while engine.documents.store.evict_one() is not None:
        pass


def _measure(
    name: str, model: Any, shape: ModelShape, layers: int, context: int, options: Options
) -> list[Row]:
    heads = spread_heads(layers, shape.num_kv_heads)
    kv_bytes = 2 * layers * shape.num_kv_heads * shape.head_dim * options.torch_dtype.itemsize
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, shape.vocab_size, context // _DOCUMENTS) for _ in range(_DOCUMENTS)]
    question = rng.integers(0, shape.vocab_size, _QUESTION_TOKENS)
    policies: dict[str, Policy] = {
        "naive": Naive(),
        "redknot": RedKnot(dense_until=1, ffn_mass=0.2),
    }
    samples: dict[tuple[str, str], list[float]] = {}
    moved: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            "computed": "mem:",
            "host memory": "mem:?capacity=16GiB&prefer=load",
            "lmdb": f"lmdb://{Path(folder)}/store?prefer=load",
        }
        engines = {
            way: Engine(model, heads, kv_budget=3 * kv_bytes * context + (64 << 20), store=store,
                        chat=False)
            for way, store in stores.items()
        }  # fmt: skip
        documents = {way: [e.add(text) for text in texts] for way, e in engines.items()}
        for engine in engines.values():
            engine.flush()
        for number in range(4):  # the first round warms up and is not counted
            for policy_name, policy in policies.items():
                for way, engine in engines.items():
                    options.progress(f"store {name} {context}: {policy_name}, {way}, {number} of 3")
                    before = sum(tier.counts.bytes_read for tier in engine.store.tiers)
                    _empty(engine)
                    result = engine.prefill(documents[way], question, policy=policy)
                    sources = {report.source for report in result.explain().documents}
                    assert sources == {"computed" if way == "computed" else "loaded"}
                    if number:
                        samples.setdefault((policy_name, way), []).append(result.ttft_seconds)
                    after = sum(tier.counts.bytes_read for tier in engine.store.tiers)
                    moved[policy_name, way] = after - before
        for engine in engines.values():
            engine.close()
    rows = []
    for (policy_name, way), values in samples.items():
        own, computed = Timing(tuple(values)), Timing(tuple(samples[policy_name, "computed"]))
        faster = None if way == "computed" else ratio(own, computed)
        rows.append(
            Row(
                kind="warm start",
                heads="mixed",
                shape=f"{name} x {layers} layers, {_DOCUMENTS} documents of "
                f"{context // _DOCUMENTS}, {policy_name}: {way}",
                time_ms=1e3 * own.median,
                spread_ms=1e3 * own.spread,
                gbps=moved[policy_name, way] / own.median / 1e9 or None,
                ratios={} if faster is None else {"computed": faster},
                peers_ms={} if way == "computed" else {"computed": 1e3 * computed.median},
                details={
                    "model": name,
                    "layers": layers,
                    "context": context,
                    "policy": policy_name,
                    "source": way,
                    "bytes_read": moved[policy_name, way],
                    "bytes_stored": kv_bytes * context,
                    "samples": len(values),
                },
            )
        )
    return rows
