"""Which pages of the cached segments lie in the page pool, by head class and region."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redknot.cache import KVPool
from redknot.heads import HeadMap
from redknot.store import Segment
from redknot.store.layout import MIDDLE, REGIONS, NeededTokens, Regions
from redknot.store.pool_pages import clean_pages

__all__ = ["SegmentParts"]

_Pages = NDArray[np.bool_]  # [num_layers, num_kv_heads, pages]


@dataclass
class _Parts:
    held: _Pages  # has a page in the pool
    valid: _Pages  # of those: K and V are there


class SegmentParts:
    """Pages of one pool's segments; of a segment that nothing is said about all are there.

    Parameters
    ----------
    pool : KVPool
    heads : HeadMap
        Decides which pages are sinks, windows, the middle of local heads, or global heads'.
    sliding_windows : list
        The model's own, by layer (`Decoder.sliding_windows`).
    """

    def __init__(self, pool: KVPool, heads: HeadMap, sliding_windows: list[int | None]) -> None:
        self._pool = pool
        windows, sinks = heads.rules(sliding_windows)
        self._rules = (heads.is_global, windows, sinks)
        self._parts: dict[int, _Parts] = {}  # by handle
        self._regions: dict[int, NDArray[np.uint8]] = {}  # by pages of a row

    def regions(self, num_tokens: int) -> Regions:
        """How many pages of each head are its sink and its window."""
        return Regions.of_heads(*self._rules, self._pool.page_size, self._num_pages(num_tokens))

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.page_size)

    def _region_of_pages(self, num_tokens: int) -> NDArray[np.uint8]:
        num_pages = self._num_pages(num_tokens)
        if num_pages not in self._regions:
            self._regions[num_pages] = self.regions(num_tokens).of_pages(num_pages)
        return self._regions[num_pages]

    def pages(self, need: NeededTokens) -> _Pages:
        """Pages of the pool that hold a needed token."""
        return need.pages(self._pool.page_size)

    def used(self, num_tokens: int, need: NeededTokens | None) -> list[int]:
        """Numbers of the regions that a request uses of a segment, the coldest first.

        What it reads of the middle counts; sinks, windows and global heads are used by everyone.
        """
        region = self._region_of_pages(num_tokens)
        middle = region == MIDDLE
        is_read = middle.any() if need is None else (middle & self.pages(need)).any()
        return [n for n in range(len(REGIONS)) if n != MIDDLE or is_read]

    # --- one segment -----------------------------------------------------------------------------

    def put(self, handle: int, held: _Pages, valid: _Pages) -> None:
        """A segment came into the pool, of which some pages are missing or not read."""
        if not valid.all():
            self._parts[handle] = _Parts(held, valid)
            clean_pages(self._pool, handle, held & ~valid)

    def forget(self, handle: int) -> None:
        """The segment's pages were given back."""
        self._parts.pop(handle, None)

    def is_partial(self, handle: int) -> bool:
        """Whether some of the segment's K and V are not in the pool."""
        return handle in self._parts

    def not_valid(self, handle: int, need: NeededTokens | None) -> _Pages | None:
        """Pages that are needed (None: all) and not there; None where nothing is missing."""
        parts = self._parts.get(handle)
        if parts is None:
            return None
        missing = ~parts.valid if need is None else ~parts.valid & self.pages(need)
        return missing if missing.any() else None

    def not_held(self, handle: int, need: NeededTokens | None) -> _Pages | None:
        """Pages that are needed (None: all) and have no place in the pool; None for nothing."""
        parts = self._parts.get(handle)
        if parts is None:
            return None
        missing = ~parts.held if need is None else ~parts.held & self.pages(need)
        return missing if missing.any() else None

    def hold(self, handle: int, pages: _Pages) -> None:
        """Give pages a place.

        Raises
        ------
        redknot._memory.OutOfPages
            When the pool cannot take them; nothing was changed.
        """
        self._pool.allocator.restore_segment_pages(handle, pages)
        self._parts[handle].held |= pages
        clean_pages(self._pool, handle, pages)

    def fill(self, handle: int, pages: _Pages) -> None:
        """K and V of pages were put in their places."""
        parts = self._parts[handle]
        parts.valid |= pages
        if parts.valid.all():
            del self._parts[handle]

    def drop(self, segment: Segment, region: int) -> int:
        """Let the pages of one region of a segment go; returns how many became free."""
        pages = self._region_of_pages(segment.num_tokens) == region
        parts = self._parts.setdefault(
            segment.handle, _Parts(np.ones_like(pages), np.ones_like(pages))
        )
        before = self._pool.allocator.free_pages()
        self._pool.drop_segment_pages(segment.handle, pages & parts.held)
        parts.held &= ~pages
        parts.valid &= ~pages
        return self._pool.allocator.free_pages() - before
