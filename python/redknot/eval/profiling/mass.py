"""Where attention goes: its mass by distance, streamed over query rows, never a square matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AttentionMass", "attention_mass", "distance_grid"]

# Scores of one block of query rows over all keys, fp32: bounds the workspace of a pass.
_BLOCK_BYTES = 32 * 2**20


def distance_grid(longest: int) -> list[int]:
    """Windows at which the mass is told: 1, 2, 3, 4, 6, 8, 12, ... up to `longest` tokens."""
    grid, step = [1], 1
    while grid[-1] < longest:
        step *= 2
        grid += [step, step * 3 // 2] if step > 1 else []
    return sorted({min(window, longest) for window in grid})


@dataclass(frozen=True)
class AttentionMass:
    """Sums over query rows, per query head.

    Attributes
    ----------
    covered : fp64 Tensor [num_q_heads, num_windows]
        Mass inside sink + window.
    page_share : fp64 Tensor [num_q_heads]
        Share of the pages that is needed to hold `top_p` of the mass.
    """

    covered: Tensor
    page_share: Tensor


def attention_mass(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    windows: Tensor,
    *,
    sink: int,
    softmax_scale: float,
    softcap: float = 0.0,
    native_window: int = -1,
    page_size: int = 64,
    top_p: float = 0.9,
) -> AttentionMass:
    """Mass of causal attention inside sink + window, for many windows at once.

    Takes query rows in blocks, so that it needs memory for a few rows of scores per head whatever
    the length; on any device.

    Parameters
    ----------
    q : Tensor [num_rows, num_q_heads, head_dim]
        Rotated queries.
    k : Tensor [num_keys, num_kv_heads, head_dim]
        Rotated keys at positions 0 to num_keys - 1.
    q_positions : int Tensor [num_rows]
        Smaller than num_keys.
    windows : int Tensor [num_windows]
        A window counts the current token.
    sink : int
        First keys that count as covered by every window.
    softmax_scale, softcap : float
    native_window : int
        The model's own sliding window; -1: none.
    page_size, top_p : int, float
        Of `page_share`.
    """
    num_rows, num_q_heads = q.shape[:2]
    num_keys, num_kv_heads = k.shape[:2]
    device, group = q.device, num_q_heads // num_kv_heads
    covered = torch.zeros(num_q_heads, len(windows), dtype=torch.float64, device=device)
    shares = torch.zeros(num_q_heads, dtype=torch.float64, device=device)
    keys = k.float().permute(1, 2, 0)  # [num_kv_heads, head_dim, num_keys]
    index = torch.arange(num_keys, device=device)
    q_positions, windows = q_positions.long().to(device), windows.long().to(device)
    num_pages = -(-num_keys // page_size)
    rows_at_once = max(1, _BLOCK_BYTES // (4 * group * num_keys))
    for begin in range(0, num_rows, rows_at_once):
        rows = slice(begin, min(begin + rows_at_once, num_rows))
        at = q_positions[rows, None]
        hidden = index > at
        if native_window >= 0:
            hidden |= index <= at - native_window
        # Keys of the sink are counted once, whether or not the window holds them too.
        sink_end = (at + 1).clamp(max=sink)
        window_begin = torch.maximum(at + 1 - windows, sink_end).clamp(min=0)
        pages_seen = at // page_size + 1
        for head in range(num_kv_heads):
            own = slice(head * group, (head + 1) * group)
            queries = q[rows, own].float().transpose(0, 1)  # [group, rows, head_dim]
            scores = torch.matmul(queries, keys[head]) * softmax_scale
            if softcap:
                scores = softcap * (scores / softcap).tanh_()
            mass = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
            paged = F.pad(mass, (0, num_pages * page_size - num_keys))
            paged = paged.view(*mass.shape[:2], num_pages, page_size).sum(-1)
            held = paged.sort(-1, descending=True).values.cumsum(-1)
            needed = (held < top_p).sum(-1) + 1
            shares[own] += (needed / pages_seen.T).clamp(max=1).double().sum(-1)
            before = F.pad(mass.cumsum(-1), (1, 0))  # mass of the keys in front of each
            shape = (group, -1, -1)
            in_sink = before.gather(-1, sink_end.expand(shape))
            seen = before.gather(-1, (at + 1).expand(shape))
            outside = before.gather(-1, window_begin.expand(shape))
            covered[own] += (in_sink + seen - outside).double().sum(1)
    return AttentionMass(covered, shares)
