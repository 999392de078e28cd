"""Items in this process's memory: the host tier."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from redknot.store.backend import ItemWrite, RangeRead, Status

__all__ = ["MemBackend"]


class MemBackend:
    """`mem:`: a dictionary of bytes. See `StorageBackend`."""

    name = "mem"
    may_block = False

    def __init__(self) -> None:
        self._items: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, keys: Sequence[str], timeout: float) -> list[bytes | Status]:
        """See `StorageBackend`."""
        return [self._items.get(key, Status.MISSING) for key in keys]

    def get_ranges(self, reads: Sequence[RangeRead], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        return [copy_ranges(self._items.get(read.key), read) for read in reads]

    def put(self, items: Sequence[ItemWrite], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        copies = {item.key: bytes(item.data) for item in items}
        with self._lock:
            self._items.update(copies)
        return [Status.OK] * len(items)

    def remove(self, keys: Sequence[str], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        with self._lock:
            found = [self._items.pop(key, None) for key in keys]
        return [Status.MISSING if item is None else Status.OK for item in found]

    def sizes(self, prefix: str, timeout: float) -> Mapping[str, int]:
        """See `StorageBackend`."""
        with self._lock:
            return {k: len(v) for k, v in self._items.items() if k.startswith(prefix)}

    def used_bytes(self, timeout: float) -> int:
        """See `StorageBackend`."""
        with self._lock:
            return sum(map(len, self._items.values()))

    def close(self) -> None:
        """See `StorageBackend`."""
        self._items.clear()


def copy_ranges(item: bytes | memoryview | None, read: RangeRead) -> Status:
    """Copy the ranges of an item in memory into the reader's buffer."""
    if item is None:
        return Status.MISSING
    if len(item) != read.size:
        return Status.SHORT
    source = memoryview(item)
    at = 0
    for offset, length in read.ranges:
        read.out[at : at + length] = source[offset : offset + length]
        at += length
    return Status.OK
