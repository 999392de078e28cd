"""Rotated keys, moved to other positions."""

from __future__ import annotations

from torch import Tensor

from redknot.ops.library import fake_of, register_writers, torch_ops

__all__ = ["rope_realign", "rope_realign_pages"]


def rope_realign(
    k: Tensor,
    offset: int | Tensor,
    inv_freq: Tensor,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Move rotated keys by `offset` positions: one rotation by the difference, one rounding.

    Angles are fp32 products of offset and frequency. ``attention_scaling`` of scaled rotary
    embeddings is already in the keys and is not applied again.

    Parameters
    ----------
    k : Tensor [num_tokens, num_heads, head_dim]
        Rotated keys; only the last dimension must be contiguous.
    offset : int or Tensor [num_tokens], int32
        Positions to move by, for all tokens or for each.
    inv_freq : Tensor [rotary_dim / 2], float32
        Position-independent frequencies; the first ``rotary_dim`` dimensions turn.
    interleaved : bool
        Pairs are (2 d, 2 d + 1) instead of (d, d + rotary_dim / 2).
    out : Tensor, optional
        Written to instead of a new tensor; `k` itself, or nothing that overlaps it.

    Returns
    -------
    Tensor [num_tokens, num_heads, head_dim]
        The moved keys; `out` if given.
    """
    offsets = offset if isinstance(offset, Tensor) else None
    by = 0 if isinstance(offset, Tensor) else offset
    if out is None:
        return torch_ops.rope_realign(k, by, inv_freq, interleaved, offsets=offsets)
    torch_ops.rope_realign_out(k, by, inv_freq, interleaved, offsets=offsets, out=out)
    return out


def rope_realign_pages(
    k_cache: Tensor, page_refs: Tensor, inv_freq: Tensor, interleaved: bool = False
) -> None:
    """Turn the valid keys of pages by their rotation offset, in place; the offset is then 0.

    Parameters
    ----------
    k_cache : Tensor [num_pages, page_size, head_dim]
        Written to.
    page_refs : Tensor [num_refs, 4]
        As for `seg_paged_attention`; each page occurs once, its first position is not looked at.
    inv_freq, interleaved
        As for `rope_realign`.
    """
    torch_ops.rope_realign_pages(k_cache, page_refs, inv_freq, interleaved)


@fake_of("rope_realign")
def _fake_rope_realign(k: Tensor, *args: object, **kwargs: object) -> Tensor:
    return k.new_empty(k.shape)


register_writers("rope_realign_out", "rope_realign_pages")
