"""What token_importance, select_tokens and gathered_ffn must compute."""

from __future__ import annotations

import torch
from torch import Tensor


def token_importance(attn_out: Tensor) -> Tensor:
    return attn_out.double().flatten(1).norm(dim=1)


def select_tokens(
    importance: Tensor, cu_seqlens: Tensor, mass: float, recent_n: int, min_keep: int
) -> list[int]:
    kept: list[int] = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        values = importance[begin:end].double().tolist()
        order = sorted(range(len(values)), key=lambda t: (-values[t], t))
        chosen = set(range(max(0, len(values) - recent_n), len(values)))
        total, running = sum(values[t] for t in order), 0.0
        for t in order:
            if mass < 1 and running >= mass * total:
                break
            running += values[t]
            chosen.add(t)
        for t in order:
            if len(chosen) >= min_keep:
                break
            chosen.add(t)
        kept += [begin + t for t in sorted(chosen)]
    return kept


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str = "silu",
) -> Tensor:
    """The FFN of a Llama layer with its norm, as Hugging Face computes it in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = norm_weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(
        x.dtype
    )
    gate = normed @ w_gate.T
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    activated = torch.nn.functional.silu(gate) if activation == "silu" else gelu
    return (activated * (normed @ w_up.T)) @ w_down.T
