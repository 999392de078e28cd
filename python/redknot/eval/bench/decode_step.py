"""Decoding a ragged batch: attention against KV bytes, whole steps against weights + KV bytes.

Attention alone, of one layer, is `decode_batch`. The step is the engine's own: one token of every
session through every layer of a slice of a named model with random weights, appended to its pages.
The monolithic cache is the same step over the same lengths with every head global. The output
projection is cut down to the slice's share of the model's layers, so that weights and KV stand to
each other as they do in the whole model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from redknot.cache import KVPool
from redknot.engine.runner import HeadRules, Runner
from redknot.eval.bench.decode_batch import decode_rows
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row, row_of
from redknot.eval.bench.timing import measure
from redknot.eval.bench.ttft import random_model
from redknot.heads import HeadMap
from redknot.models import Decoder
from redknot.recovery import ModelShape

__all__ = ["run", "step_rows"]

_PAGE_SIZE, _WINDOW, _SINK, _GLOBAL_HEADS = 64, 1024, 4, 1
_MOST_STEPS = 64  # pages are there for so many


def run(options: Options, roofs: Roofs) -> list[Row]:
    """One layer's attention, then whole steps, for each batch size."""
    return [*decode_rows(options, roofs), *step_rows(options, roofs)]


def step_rows(options: Options, roofs: Roofs) -> list[Row]:
    """A row for each batch size."""
    rows = []
    layers = options.layers or (1 if options.quick else 2)
    for name, shape in options.shapes("Llama-3-8B").items():
        share = replace(shape, vocab_size=shape.vocab_size * layers // shape.num_layers)
        options.progress(f"decode step {name}: {layers} layers of random weights")
        decoder = Decoder(random_model(share, layers, options))
        for batch in options.batches or ((8,) if options.quick else (8, 16)):
            longest = 8192 if options.quick else 16_384
            rows.append(_measure(name, decoder, batch, longest, options, roofs))
    return rows


class _Sessions:
    """A batch of sessions that decode, in a pool of their own."""

    def __init__(self, decoder: Decoder, heads: HeadMap, lengths: np.ndarray) -> None:
        shape = decoder.shape
        self._rules = HeadRules(heads.is_global, *heads.rules(decoder.sliding_windows))
        whole = -(-(lengths + _MOST_STEPS) // _PAGE_SIZE) + 1
        local = np.minimum(whole, (_WINDOW + _SINK) // _PAGE_SIZE + 4)
        num_global = int(heads.is_global.sum())
        num_rows = heads.is_global.size
        self.pool = KVPool(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_pages=int(num_global * whole.sum() + (num_rows - num_global) * local.sum()),
            page_size=_PAGE_SIZE,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self.pool.k_cache.fill_(0.01)
        self.pool.v_cache.fill_(0.01)
        allocator = self.pool.allocator
        self._runner = Runner(decoder, self.pool)
        rules = self._rules.windows, self._rules.sinks
        self._sessions = [allocator.create_session(*rules) for _ in lengths]
        for session, length in zip(self._sessions, lengths.tolist(), strict=True):
            for begin in range(0, length, _PAGE_SIZE):
                step = min(_PAGE_SIZE, length - begin)
                allocator.append_tokens([session], [step], expire_first=True)
            allocator.expire(session)
        pages = sum(allocator.session_pages(session) for session in self._sessions)
        self.num_bytes = pages * self.pool.page_bytes
        self._tokens = torch.full((len(lengths),), 5, device=decoder.device)

    def step(self) -> torch.Tensor:
        """One token of every session: what the engine's loop does, but for choosing the tokens."""
        rules = [self._rules] * len(self._sessions)
        return self._runner.decode(self._sessions, self._tokens, rules)


def _measure(
    name: str, decoder: Decoder, batch: int, longest: int, options: Options, roofs: Roofs
) -> Row:
    options.progress(f"decode step of {batch} ragged sessions, {name}")
    shape: ModelShape = decoder.shape
    lengths = np.linspace(longest // 4, longest, batch).astype(int)
    per_layer = ["global"] * _GLOBAL_HEADS + ["local"] * (shape.num_kv_heads - _GLOBAL_HEADS)
    mixed = HeadMap([per_layer] * shape.num_layers, window=_WINDOW, sink=_SINK)
    ours = _Sessions(decoder, mixed, lengths)
    monolithic = _Sessions(
        decoder, HeadMap.all_global(shape.num_layers, shape.num_kv_heads), lengths
    )
    timings = measure(
        {"": ours.step, "monolithic": monolithic.step}, seconds=4.0 if options.quick else 12.0
    )
    # The embeddings are the output projection too; a step reads them all as the latter.
    weights = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    bytes_ratio = (weights + monolithic.num_bytes) / (weights + ours.num_bytes)
    times_faster = timings["monolithic"].median / timings[""].median
    keys = ours.num_bytes / (2 * shape.head_dim * decoder.dtype.itemsize)
    return row_of(
        timings,
        roofs,
        kind="decode step",
        heads="mixed",
        shape=f"{name} x {shape.num_layers} layers, {batch} ragged to {longest}: "
        f"{bytes_ratio:.2f}x fewer bytes of weights + KV, "
        f"{times_faster / bytes_ratio:.2f} of it in time",
        flops=2.0 * weights / decoder.dtype.itemsize * batch
        + 4.0 * keys * shape.group_size * shape.head_dim,
        num_bytes=float(weights + ours.num_bytes),
        details={
            "model": name,
            "layers": shape.num_layers,
            "vocab_size": shape.vocab_size,
            "batch": batch,
            "lengths": lengths.tolist(),
            "window": _WINDOW,
            "global_fraction": mixed.global_fraction,
            "weight_bytes": weights,
            "kv_bytes": ours.num_bytes,
            "kv_bytes_monolithic": monolithic.num_bytes,
            "bytes_ratio": bytes_ratio,
            "time_ratio": times_faster,
            "efficiency": times_faster / bytes_ratio,
        },
    )
