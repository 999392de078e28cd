"""What seg_paged_attention must compute: dense masks from the visibility rule, in any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rows:
    """The arguments of seg_paged_attention between the page pool and the options."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    row_indptr: Tensor
    page_refs: Tensor
    cu_seqlens_q: Tensor
    q_positions: Tensor
    row_window: Tensor
    row_sink: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return tuple(self.__dict__.values())


def rotate(x: Tensor, offset: int, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """R(offset) x over the last dimension; pairs are halves or neighbours, angles in fp32."""
    half = inv_freq.numel()
    angle = (torch.tensor(float(offset), dtype=torch.float32) * inv_freq).to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = angle.cos(), angle.sin()
    if interleaved:
        a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        pairs = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
        return torch.cat([pairs, rest], -1)
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def row_keys(
    rows: Rows,
    row: int,
    dtype: torch.dtype,
    inv_freq: Tensor | None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys moved to their true positions, values, positions of one row."""
    head_dim = rows.q.shape[-1]
    keys, values = [torch.empty(0, head_dim, dtype=dtype)], [torch.empty(0, head_dim, dtype=dtype)]
    positions = [torch.empty(0, dtype=torch.long)]
    begin, end = rows.row_indptr[row : row + 2].tolist()
    for page, first, valid, offset in rows.page_refs[begin:end].tolist():
        key = rows.k_cache[page, :valid].to(dtype)
        keys.append(rotate(key, offset, inv_freq, interleaved) if offset else key)
        values.append(rows.v_cache[page, :valid].to(dtype))
        positions.append(torch.arange(first, first + valid))
    return torch.cat(keys), torch.cat(values), torch.cat(positions)


def attention(
    rows: Rows,
    dtype: torch.dtype = torch.float64,
    softmax_scale: float | None = None,
    inv_freq: Tensor | None = None,
    rope_interleaved: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per sequence, head and query: softmax over the visible keys; zeros and -inf without any."""
    num_tokens, num_q_heads, head_dim = rows.q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    num_seqs = rows.cu_seqlens_q.numel() - 1
    out = torch.zeros(rows.q.shape, dtype=dtype)
    lse = torch.full((num_q_heads, num_tokens), -torch.inf, dtype=dtype)
    if num_seqs == 0:
        return out, lse
    num_kv_heads = rows.row_window.numel() // num_seqs
    for row in range(rows.row_window.numel()):
        seq, kv_head = divmod(row, num_kv_heads)
        k, v, j = row_keys(rows, row, dtype, inv_freq, rope_interleaved)
        tokens = slice(*rows.cu_seqlens_q[seq : seq + 2].tolist())
        i = rows.q_positions[tokens, None].long()
        window, sink = int(rows.row_window[row]), int(rows.row_sink[row])
        visible = (j <= i) & ((window < 0) | (j < sink) | (j > i - window))
        group = num_q_heads // num_kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            score = rows.q[tokens, head].to(dtype) @ k.T * scale
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            score = score.masked_fill(~visible, -torch.inf)
            weight = torch.softmax(score, -1).nan_to_num(0.0)  # 0 / 0 of a row without keys
            out[tokens, head] = weight @ v
            lse[head, tokens] = torch.logsumexp(score, -1) if j.numel() else -torch.inf
    return out, lse
