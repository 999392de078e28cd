"""Between the page pool and the byte layout of stored segments."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redknot.cache import KVPool
from redknot.store.layout import SegmentLayout

__all__ = ["gather_segment", "scatter_segment", "zero_segment"]


def _slots(pool: KVPool, handle: int, num_layers: int) -> NDArray[np.int64]:
    """Slots of a segment by flat (layer, head, token)."""
    slots = [pool.allocator.segment_slots(handle, layer).T for layer in range(num_layers)]
    return np.stack(slots).reshape(-1)


def _index(pool: KVPool, array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array).to(pool.device)


def gather_segment(pool: KVPool, handle: int, layout: SegmentLayout) -> NDArray[np.uint8]:
    """Bytes of all pages of a segment, in storage order (a copy)."""
    k_row, v_row, token = layout.rows(layout.selection(None))
    slots = _index(pool, _slots(pool, handle, layout.shape.num_layers)[token])
    head_dim = pool.k_cache.shape[-1]
    rows = torch.empty((2 * len(token), head_dim), dtype=pool.k_cache.dtype)
    for cache, row in ((pool.k_cache, k_row), (pool.v_cache, v_row)):
        rows[torch.from_numpy(row)] = cache.view(-1, head_dim)[slots].cpu()
    return rows.view(torch.uint8).numpy().reshape(-1)


def scatter_segment(
    pool: KVPool,
    handle: int,
    layout: SegmentLayout,
    selection: NDArray[np.int64],
    buffer: NDArray[np.uint8],
) -> None:
    """Put pages that were read into the pages of a segment; the page sizes may differ."""
    if not len(selection):
        return
    k_row, v_row, token = layout.rows(selection)
    slots = _index(pool, _slots(pool, handle, layout.shape.num_layers)[token])
    head_dim = pool.k_cache.shape[-1]
    rows = torch.from_numpy(buffer).view(pool.k_cache.dtype).view(-1, head_dim).to(pool.device)
    for cache, row in ((pool.k_cache, k_row), (pool.v_cache, v_row)):
        cache.view(-1, head_dim).index_copy_(0, slots, rows[_index(pool, row)])


def zero_segment(pool: KVPool, handle: int, num_layers: int) -> None:
    """Make every slot of a segment zero, so that what is not read is at least finite.

    Where freed pages are poisoned, what is not read becomes NaN instead, which proves that nothing
    reads it.
    """
    value = torch.nan if pool.allocator.poisons_freed_pages else 0.0
    slots = _index(pool, _slots(pool, handle, num_layers))
    head_dim = pool.k_cache.shape[-1]
    for cache in (pool.k_cache, pool.v_cache):
        cache.view(-1, head_dim).index_fill_(0, slots, value)
