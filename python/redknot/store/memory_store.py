"""Segments in the pool itself: the tier that is always there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redknot.store.segment import Segment

if TYPE_CHECKING:
    from redknot.cache import KVPool

__all__ = ["MemoryStore", "StoreStats"]


@dataclass
class StoreStats:
    """Counts since the store was opened."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class MemoryStore:
    """Segments by key, least recently used first out. Thread-safe."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._segments: OrderedDict[str, Segment] = OrderedDict()
        self._evicted: set[str] = set()  # keys alone, so that a later miss can say why
        self._lock = threading.Lock()
        self.stats = StoreStats()

    def __len__(self) -> int:
        return len(self._segments)

    def __contains__(self, key: str) -> bool:
        return key in self._segments

    def get(self, key: str) -> Segment | None:
        """Return the segment of `key` and mark it used; None is a counted miss."""
        with self._lock:
            segment = self._segments.get(key)
            if segment is None:
                self.stats.misses += 1
                return None
            self._segments.move_to_end(key)
            self.stats.hits += 1
            return segment

    def peek(self, key: str) -> Segment:
        """Return the segment of `key`, which is there, as if nobody had asked for it."""
        return self._segments[key]

    def put(self, segment: Segment) -> None:
        """Take over a segment and its pages."""
        with self._lock:
            if segment.key in self._segments:
                raise ValueError(f"MemoryStore.put: segment {segment.key[:12]} is already stored")
            self._segments[segment.key] = segment
            self._evicted.discard(segment.key)

    def replace(self, key: str, segment: Segment) -> None:
        """Put `segment`, which has taken over the pages of the segment `key`, in its place."""
        with self._lock:
            if self._segments[key].handle != segment.handle:
                raise ValueError(f"MemoryStore.replace: segment {key[:12]} has pages of its own")
            del self._segments[key]
            self._segments[segment.key] = segment
            self._evicted.discard(segment.key)

    def discard(self, key: str) -> None:
        """Drop one segment, if it is there; sessions that share its pages keep them."""
        with self._lock:
            segment = self._segments.pop(key, None)
            if segment is not None:
                self._pool.allocator.release_segment(segment.handle)

    def was_evicted(self, key: str) -> bool:
        """Whether a segment of this key was here and had to go."""
        return key in self._evicted

    def evict_one(self, keep: Collection[str] = ()) -> Segment | None:
        """Drop the least recently used segment whose key is not in `keep`; None if there is none.

        Pages that sessions still share stay until those let go.
        """
        with self._lock:
            for key, segment in self._segments.items():
                if key not in keep:
                    del self._segments[key]
                    self._pool.allocator.release_segment(segment.handle)
                    self._evicted.add(key)
                    self.stats.evictions += 1
                    return segment
            return None

    def clear(self) -> None:
        """Drop every segment."""
        while self.evict_one() is not None:
            pass
