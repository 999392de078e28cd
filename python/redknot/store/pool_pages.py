"""Between the page pool and the byte layout of stored segments."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redknot.cache import KVPool
from redknot.store.layout import SegmentLayout

__all__ = ["clean_pages", "gather_segment", "scatter_segment"]


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
    """Put pages that were read into those that a segment has; the page sizes may differ."""
    if not len(selection):
        return
    k_row, v_row, token = layout.rows(selection)
    slots = _slots(pool, handle, layout.shape.num_layers)[token]
    there = slots >= 0
    if not there.all():
        k_row, v_row, slots = k_row[there], v_row[there], slots[there]
    head_dim = pool.k_cache.shape[-1]
    rows = torch.from_numpy(buffer).view(pool.k_cache.dtype).view(-1, head_dim).to(pool.device)
    for cache, row in ((pool.k_cache, k_row), (pool.v_cache, v_row)):
        cache.view(-1, head_dim).index_copy_(0, _index(pool, slots), rows[_index(pool, row)])


def clean_pages(pool: KVPool, handle: int, pages: NDArray[np.bool_]) -> None:
    """Make pages [num_layers, num_kv_heads, pages] that a segment has harmless to touch."""
    numbers = []
    for layer in np.flatnonzero(pages.any(axis=(1, 2))):
        slots = pool.allocator.segment_slots(handle, int(layer))[:: pool.page_size].T
        numbers.append(slots[pages[layer]] // pool.page_size)
    if numbers:
        pool.clean(_index(pool, np.concatenate(numbers)))
