"""Attention over plain key and value tensors, through the same op as paged attention.

Each (batch row, KV head) is one page as long as the keys; only with padding are they copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redknot import ops

__all__ = ["attend_contiguous"]


def attend_contiguous(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_token: Tensor | None,
    query_offset: int,
    key_offset: int,
    windows: Tensor,
    sinks: Tensor,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention per head rule; pads are neither keys nor queries.

    Parameters
    ----------
    q : Tensor [batch, num_queries, num_q_heads, head_dim]
        At slots `query_offset` onwards.
    k, v : Tensor [batch, num_kv_heads, num_keys, head_dim]
        At slots `key_offset` onwards.
    is_token : bool Tensor [batch, key_offset + num_keys] or None
        False where a slot is padding. A token's position is its rank among the tokens of its row.
    windows, sinks : int32 Tensor [num_kv_heads]
        Window -1: global.

    Returns
    -------
    Tensor
        Like q; zero for pads.
    """
    batch, num_queries = q.shape[:2]
    num_kv_heads, num_keys = k.shape[1:3]
    device = q.device
    flat_q = q.reshape(batch * num_queries, *q.shape[2:])
    if is_token is None:
        num_valid = torch.full((batch,), num_keys, device=device)
        first = torch.full((batch,), key_offset, device=device)
        positions = torch.arange(query_offset, query_offset + num_queries, device=device)
        positions = positions.repeat(batch)
        counts = torch.full((batch,), num_queries, device=device)
        token_index = None
    else:
        ranks = is_token.cumsum(1) - 1
        is_key = is_token[:, key_offset:]
        num_valid = is_key.sum(1)
        first = is_token[:, :key_offset].sum(1)
        # A page has no holes: tokens move to its front, in their order.
        order = torch.argsort((~is_key).to(torch.int8), dim=1, stable=True)[:, None, :, None]
        k, v = (x.gather(2, order.expand(-1, num_kv_heads, -1, x.shape[3])) for x in (k, v))
        is_query = is_token[:, query_offset : query_offset + num_queries]
        counts = is_query.sum(1)
        token_index = is_query.reshape(-1).nonzero().squeeze(1)
        positions = ranks[:, query_offset : query_offset + num_queries].reshape(-1)[token_index]

    num_rows = batch * num_kv_heads
    refs = torch.zeros((num_rows, 4), dtype=torch.int32, device=device)
    refs[:, 0] = torch.arange(num_rows, device=device)
    refs[:, 1] = first.repeat_interleave(num_kv_heads)
    refs[:, 2] = num_valid.repeat_interleave(num_kv_heads)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = counts.cumsum(0)
    out, _ = ops.seg_paged_attention(
        flat_q if token_index is None else flat_q[token_index],
        k.reshape(num_rows, num_keys, k.shape[3]),
        v.reshape(num_rows, num_keys, v.shape[3]),
        torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        refs,
        cu_seqlens,
        positions.to(torch.int32),
        windows.repeat(batch),
        sinks.repeat(batch),
        softmax_scale=softmax_scale,
        softcap=softcap,
    )
    if token_index is not None:
        token_out, out = out, torch.zeros_like(flat_q)
        out[token_index] = token_out
    return out.view(batch, num_queries, *out.shape[1:])
