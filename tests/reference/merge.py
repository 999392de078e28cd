"""What merge_states must compute."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    lses = torch.stack([lse_a, lse_b]).double()
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num(0.0)  # -inf - -inf: neither side has seen a key
    outs = torch.stack([out_a, out_b]).double()
    outs = outs.where(weights.mT[..., None] > 0, 0.0)
    return (weights.mT[..., None] * outs).sum(0), lse
