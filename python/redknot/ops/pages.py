"""Pages of the pool: written by token, copied whole."""

from __future__ import annotations

from torch import Tensor

from redknot.ops.library import register_writers, torch_ops

__all__ = ["copy_pages", "write_pages"]


def write_pages(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write the keys and values of tokens to slots of the page pool, in place.

    Parameters
    ----------
    k, v : Tensor [num_tokens, num_kv_heads, head_dim]
        In the dtype of the pool; only the last dimension must be contiguous.
    k_cache, v_cache : Tensor [num_pages, page_size, head_dim]
        The page pool, written to.
    slots : Tensor [num_tokens, num_kv_heads], int64
        ``page * page_size + slot``, or -1 to skip. Slots are distinct.
    """
    torch_ops.write_pages(k, v, k_cache, v_cache, slots)


def copy_pages(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
    """Copy whole pages of the pool, K and V, in place: the copies of copy on write.

    Parameters
    ----------
    k_cache, v_cache : Tensor [num_pages, page_size, head_dim]
        The page pool, written to.
    copies : Tensor [num_copies, 2]
        Source and destination pages. A destination occurs once and is no source.
    """
    torch_ops.copy_pages(k_cache, v_cache, copies)


register_writers("write_pages", "copy_pages")
