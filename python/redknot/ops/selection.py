"""Which tokens matter."""

from __future__ import annotations

import torch
from torch import Tensor

from redknot.ops.library import fake_of, torch_ops

__all__ = ["select_tokens", "token_importance"]


def token_importance(attn_out: Tensor) -> Tensor:
    """L2 norm of each token's attention output over all heads, before the output projection.

    Parameters
    ----------
    attn_out : Tensor [num_tokens, num_q_heads, head_dim]
        Only the last dimension must be contiguous.

    Returns
    -------
    Tensor [num_tokens], float32
    """
    return torch_ops.token_importance(attn_out)


def select_tokens(
    importance: Tensor, cu_seqlens: Tensor, mass: float, recent_n: int = 0, min_keep: int = 0
) -> tuple[Tensor, Tensor]:
    """Pick, per sequence, the smallest set of tokens that holds `mass` of the importance.

    The token that crosses the threshold is included, ties go to the lower index, and
    ``mass >= 1`` keeps all. The last `recent_n` tokens are kept besides, and then more by
    importance until `min_keep` are.

    Parameters
    ----------
    importance : Tensor [num_tokens], float32
        Finite and not negative.
    cu_seqlens : Tensor [num_seqs + 1]
        Bounds of the sequences.
    mass : float
        Fraction of each sequence's sum.
    recent_n, min_keep : int
        Tokens per sequence.

    Returns
    -------
    indices : Tensor [num_tokens], int32
        Kept tokens in ascending order, then -1.
    count : Tensor [1], int32
        How many are kept; on the device, so that nothing waits for it.
    """
    return torch_ops.select_tokens(importance, cu_seqlens, mass, recent_n, min_keep)


@fake_of("token_importance")
def _fake_token_importance(attn_out: Tensor) -> Tensor:
    return attn_out.new_empty(attn_out.shape[0], dtype=torch.float32)


@fake_of("select_tokens")
def _fake_select_tokens(
    importance: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return (
        importance.new_empty(importance.shape, dtype=torch.int32),
        importance.new_empty(1, dtype=torch.int32),
    )
