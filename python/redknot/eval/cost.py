"""What a prefill over cached documents would cost under a head map, counted by the ledger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redknot.heads import HeadMap
from redknot.recovery import FlopCounter, ModelShape, dense_prefill_flops

__all__ = ["dense_flops", "published_prefill_flops"]


def published_prefill_flops(
    heads: HeadMap,
    shape: ModelShape,
    num_tokens: int,
    question_tokens: int,
    *,
    sliding_windows: Sequence[int | None] | None = None,
    ffn_keep: float = 1.0,
    dense_until: int = 0,
) -> dict[str, float]:
    """FLOPs by part of RedKnot as published, every document row live in every layer.

    Parameters
    ----------
    num_tokens, question_tokens : int
        Tokens of the prompt, and those of them that are no document's.
    sliding_windows : sequence of int or None, [num_layers], optional
        The model's own.
    ffn_keep : float
        Share of the document rows whose FFN runs from layer `dense_until` on.
    """
    windows, sinks = heads.rules(sliding_windows)
    positions = np.arange(num_tokens)
    counter = FlopCounter(shape)
    for layer in range(shape.num_layers):
        num_global = int(heads.is_global[layer].sum())
        num_local = shape.num_kv_heads - num_global
        counter.query_and_output(num_tokens)
        counter.key_value(num_tokens, num_global)
        counter.key_value(question_tokens, num_local)
        counter.rotation(
            num_tokens * (shape.num_q_heads + num_global) + question_tokens * num_local
        )
        counter.attention(positions, windows[layer], sinks[layer])
        if ffn_keep < 1 and layer >= dense_until:
            counter.selection(num_tokens)
            counter.ffn(question_tokens + round(ffn_keep * (num_tokens - question_tokens)))
        else:
            counter.ffn(num_tokens)
    counter.lm_head()
    return counter.close()


def dense_flops(
    shape: ModelShape, num_tokens: int, sliding_windows: Sequence[int | None] | None = None
) -> float:
    """FLOPs of dense prefill of the same tokens, inside the model's own sliding windows."""
    every = HeadMap.all_global(shape.num_layers, shape.num_kv_heads)
    return dense_prefill_flops(shape, num_tokens, every.rules(sliding_windows)[0])
