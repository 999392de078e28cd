"""What a storage engine must offer, and nothing of what is stored in it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ItemWrite", "RangeRead", "Status", "StorageBackend", "UnusableBackend"]


class Status(enum.Enum):
    """What became of one item of a batch; the value is how messages name it."""

    OK = "ok"
    MISSING = "not stored"
    SHORT = "shorter than it should be"
    CORRUPT = "damaged"
    TIMEOUT = "timed out"
    UNREACHABLE = "unreachable"
    FULL = "no space left"
    ERROR = "failed"


@dataclass(frozen=True)
class RangeRead:
    """Byte ranges of one item, read one behind the other into the caller's buffer.

    Attributes
    ----------
    key : str
        Of the item.
    ranges : sequence of (offset, length)
        In bytes of the item.
    size : int
        Bytes the whole item must have; an item of another size is SHORT and is not read.
    out : memoryview
        Writable, as long as all ranges together. After a TIMEOUT it must not be used again: a late
        answer may still be written to it.
    """

    key: str
    ranges: Sequence[tuple[int, int]]
    size: int
    out: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes asked for."""
        return sum(length for _, length in self.ranges)


@dataclass(frozen=True)
class ItemWrite:
    """One item to be stored as a whole, or not at all."""

    key: str
    data: memoryview | bytes


class StorageBackend(Protocol):
    """Items of bytes by key (at most 200 ASCII characters); batch first, safe for several threads.

    Failures are statuses, one for each item, never exceptions. `timeout` is in seconds; an engine
    that cannot be interrupted (a file system) may take longer, so callers that must not wait run it
    on a thread they can leave behind.
    """

    @property
    def name(self) -> str:
        """Kind of engine, as metrics and explanations call it: "mem", "lmdb", "redis"."""
        ...

    @property
    def may_block(self) -> bool:
        """Whether a call may wait for a disk or another machine."""
        ...

    def get(self, keys: Sequence[str], timeout: float) -> list[bytes | Status]:
        """Read whole, small items."""
        ...

    def get_ranges(self, reads: Sequence[RangeRead], timeout: float) -> list[Status]:
        """Read byte ranges into the callers' buffers."""
        ...

    def put(self, items: Sequence[ItemWrite], timeout: float) -> list[Status]:
        """Store items, each of them wholly or not at all, in the order given."""
        ...

    def remove(self, keys: Sequence[str], timeout: float) -> list[Status]:
        """Remove items; one that is not there is MISSING."""
        ...

    def sizes(self, prefix: str, timeout: float) -> Mapping[str, int] | Status:
        """Sizes in bytes of all items whose key begins with `prefix`."""
        ...

    def used_bytes(self, timeout: float) -> int | Status:
        """Bytes that the items take on the medium, as far as the engine can tell."""
        ...

    def close(self) -> None:
        """Let go of files and connections; nothing may be called afterwards."""
        ...


class UnusableBackend:
    """Stands for a store that was found damaged: it holds nothing and takes nothing."""

    may_block = False

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, keys: Sequence[str], timeout: float) -> list[bytes | Status]:
        """See `StorageBackend`."""
        return [Status.CORRUPT] * len(keys)

    def get_ranges(self, reads: Sequence[RangeRead], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        return [Status.CORRUPT] * len(reads)

    def put(self, items: Sequence[ItemWrite], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        return [Status.CORRUPT] * len(items)

    def remove(self, keys: Sequence[str], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        return [Status.CORRUPT] * len(keys)

    def sizes(self, prefix: str, timeout: float) -> Mapping[str, int] | Status:
        """See `StorageBackend`."""
        return Status.CORRUPT

    def used_bytes(self, timeout: float) -> int | Status:
        """See `StorageBackend`."""
        return 0

    def close(self) -> None:
        """See `StorageBackend`."""
