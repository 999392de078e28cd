"""Segments in the pool itself: the tier that is always there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redknot.store.layout import REGIONS
from redknot.store.segment import Segment

if TYPE_CHECKING:
    from redknot.cache import KVPool

__all__ = ["MemoryStore", "StoreStats"]

_ALL_REGIONS = tuple(range(len(REGIONS)))


@dataclass
class StoreStats:
    """Counts since the store was opened."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    region_evictions: int = 0  # of those: the segment stayed, without a region


class MemoryStore:
    """Segments by key; the least recently used region of one goes first. Thread-safe.

    A region (`redknot.store.layout.REGIONS`) is used by a request that reads pages of it; of those
    that one request uses, the middle of local heads is the coldest. So what no policy asks for goes
    before all else, however hot its segment is.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._segments: OrderedDict[str, Segment] = OrderedDict()
        # (key, region) of what is in the pool, the longest unused first; and each segment's regions
        # that its last user read.
        self._units: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._last_use: dict[str, frozenset[int]] = {}
        self._evicted: set[str] = set()  # keys alone, so that a later miss can say why
        self._lock = threading.Lock()
        self.stats = StoreStats()

    def __len__(self) -> int:
        return len(self._segments)

    def __contains__(self, key: str) -> bool:
        return key in self._segments

    def get(self, key: str, regions: Sequence[int] = _ALL_REGIONS) -> Segment | None:
        """Return the segment of `key`, used in these regions; None is a counted miss."""
        with self._lock:
            segment = self._segments.get(key)
            if segment is None:
                self.stats.misses += 1
                return None
            self._use(key, regions)
            self.stats.hits += 1
            return segment

    def _use(self, key: str, regions: Sequence[int]) -> None:
        """Mark regions of a segment, which has them now, as used; the coldest come first."""
        self._segments.move_to_end(key)
        self._last_use[key] = frozenset(regions)
        for region in regions:
            self._units[key, region] = None
            self._units.move_to_end((key, region))

    def peek(self, key: str) -> Segment:
        """Return the segment of `key`, which is there, as if nobody had asked for it."""
        return self._segments[key]

    def put(
        self,
        segment: Segment,
        regions: Sequence[int] = _ALL_REGIONS,
        used: Sequence[int] | None = None,
    ) -> None:
        """Take over a segment and its pages, which lie in `regions`; `used` of them are read."""
        with self._lock:
            if segment.key in self._segments:
                raise ValueError(f"MemoryStore.put: segment {segment.key[:12]} is already stored")
            self._segments[segment.key] = segment
            self._use(segment.key, regions)
            if used is not None:
                self._use(segment.key, used)
            self._evicted.discard(segment.key)

    def replace(self, key: str, segment: Segment) -> None:
        """Put `segment`, which has taken over the pages of the segment `key`, in its place."""
        with self._lock:
            if self._segments[key].handle != segment.handle:
                raise ValueError(f"MemoryStore.replace: segment {key[:12]} has pages of its own")
            regions = [region for region in _ALL_REGIONS if (key, region) in self._units]
            self._forget(key)
            self._segments[segment.key] = segment
            self._use(segment.key, regions)
            self._evicted.discard(segment.key)

    def _forget(self, key: str) -> Segment:
        for region in _ALL_REGIONS:
            self._units.pop((key, region), None)
        self._last_use.pop(key, None)
        return self._segments.pop(key)

    def discard(self, key: str) -> None:
        """Drop one segment, if it is there; sessions that share its pages keep them."""
        with self._lock:
            if key in self._segments:
                self._pool.allocator.release_segment(self._forget(key).handle)

    def was_evicted(self, key: str) -> bool:
        """Whether a segment of this key was here and had to go."""
        return key in self._evicted

    def evict_one(self, keep: Collection[str] = ()) -> Segment | None:
        """Drop the least recently used segment whose key is not in `keep`; None if there is none.

        Pages that sessions still share stay until those let go.
        """
        with self._lock:
            key = next((key for key in self._segments if key not in keep), None)
            return None if key is None else self._evict(key)

    def evict_region(
        self, keep: Collection[str], drop: Callable[[Segment, int, bool], bool]
    ) -> tuple[Segment, bool] | None:
        """Drop a region of a segment whose key is not in `keep`.

        First what the last users of the segments did not read, then the longest unused. `drop(
        segment, region, unused)` lets its pages go, or says no; then the segment goes as a whole.
        Returns the segment and whether nothing of it is left; None if there is none.
        """
        with self._lock:
            units = [unit for unit in self._units if unit[0] not in keep]
            if not units:
                return None
            cold = (unit for unit in units if self._is_unused(*unit))
            key, region = unit = next(cold, units[0])
            segment = self._segments[key]
            is_last = sum((key, other) in self._units for other in _ALL_REGIONS) == 1
            if is_last or not drop(segment, region, self._is_unused(key, region)):
                return self._evict(key), True
            del self._units[unit]
            self._evicted.add(key)
            self.stats.evictions += 1
            self.stats.region_evictions += 1
            return segment, False

    def _is_unused(self, key: str, region: int) -> bool:
        """Whether a segment's last user did not read a region."""
        return region not in self._last_use[key]

    def _evict(self, key: str) -> Segment:
        segment = self._forget(key)
        self._pool.allocator.release_segment(segment.handle)
        self._evicted.add(key)
        self.stats.evictions += 1
        return segment

    def clear(self) -> None:
        """Drop every segment."""
        while self.evict_one() is not None:
            pass
