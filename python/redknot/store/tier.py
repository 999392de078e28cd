"""One tier: a storage engine behind a deadline, with a capacity, counts and running estimates."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from redknot.store.backend import ItemWrite, RangeRead, Status, StorageBackend
from redknot.store.layout import PageRun
from redknot.store.manifest import DamagedError, Manifest
from redknot.store.tier_room import TierRoom
from redknot.store.url import StoreUrl
from redknot.store.workers import Workers

__all__ = ["Tier", "TierCounts"]

_T = TypeVar("_T")

# Bytes per call of the engine: what one deadline is for.
_BATCH_BYTES = 64 << 20
# Threads that may hang in one engine before its calls fail at once.
_MOST_THREADS = 6
# A tier that does not answer is left alone for a while, twice as long each time.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
# Running estimates: weight of the newest latency; how many loads the bandwidth is the median of.
_NEWEST = 0.3
_FEWEST_SAMPLES, _MOST_SAMPLES = 2, 9
# Every so many loads that looked too slow one is tried, so that a tier that recovered is noticed.
_PROBE_EVERY = 16


@dataclass
class TierCounts:
    """What happened in one tier since it was opened; bytes and seconds as named."""

    hits: int = 0
    misses: int = 0
    expired: int = 0
    skipped_slower: int = 0
    skipped_down: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    segments_written: int = 0
    bytes_written: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    rejected: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def fail(self, status: Status) -> None:
        """Count a call that failed, by its status."""
        self.failures[status.value] = self.failures.get(status.value, 0) + 1


class Tier:
    """Segments in one storage engine. Safe for several threads.

    Parameters
    ----------
    backend : StorageBackend
    url : StoreUrl
        Capacity, policy, TTL and timeout.
    wall_clock : callable
        Seconds since 1970; only TTLs use it. Deadlines use a clock that cannot jump.
    """

    def __init__(
        self,
        backend: StorageBackend,
        url: StoreUrl,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.backend = backend
        self.url = url
        self.name = backend.name
        self.counts = TierCounts()
        self._wall_clock = wall_clock
        self._workers = Workers(f"redknot-{self.name}", _MOST_THREADS)
        self._lock = threading.RLock()
        self._room = TierRoom(
            url.policy, url.capacity, list_objects=self._list_objects, drop_items=self._evict
        )
        self._down_until, self._pause, self._down_status = 0.0, 0.0, Status.OK
        self._told_down = 0.0
        self._latency = 0.0
        self._seconds_per_byte: deque[float] = deque(maxlen=_MOST_SAMPLES)
        self._slow_in_a_row = 0

    # --- calls with a deadline -------------------------------------------------------------------

    def call(self, job: Callable[[float], _T]) -> _T | Status:
        """Run `job(timeout)`, on a thread that can be left behind where it may block."""
        if not self.backend.may_block:
            return job(self.url.timeout)
        future = self._workers.submit(lambda: job(self.url.timeout))
        try:
            return future.result(timeout=self.url.timeout)
        except FutureTimeout:
            future.cancel()
            return Status.TIMEOUT

    def _answered(self, status: Status, *, count: bool = True) -> Status:
        """Take note of a call's outcome; a tier that does not answer is left alone for a while."""
        with self._lock:
            if status in (Status.TIMEOUT, Status.UNREACHABLE):
                self._pause = min(
                    max(2 * self._pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS
                )
                self._down_until = time.monotonic() + self._pause
                self._down_status = status
            elif status is Status.OK:
                self._pause = 0.0
            if count and status not in (Status.OK, Status.MISSING):
                self.counts.fail(status)
        return status

    def is_down(self) -> bool:
        """Whether the tier did not answer a short time ago and is not asked for now."""
        return time.monotonic() < self._down_until

    def announce_down(self) -> bool:
        """Whether nobody has yet been told that the tier is down this time."""
        with self._lock:
            told, self._told_down = self._told_down, self._down_until
            return told != self._down_until

    # --- reading ---------------------------------------------------------------------------------

    def manifest(self, key: str, *, count_misses: bool = True) -> Manifest | Status:
        """Look up a segment; anything but a manifest is a counted miss."""
        if self.is_down():
            self.counts.skipped_down += count_misses
            return self._down_status
        begin = time.perf_counter()
        answer = self.call(lambda timeout: self.backend.get([f"m/{key}"], timeout)[0])
        found: Manifest | Status
        if isinstance(answer, Status):
            found = answer
        else:
            try:
                found = Manifest.from_bytes(answer)
            except (DamagedError, ValueError, KeyError, TypeError, IndexError):
                found = Status.CORRUPT
        if isinstance(found, Manifest):
            latency = time.perf_counter() - begin
            self._latency = (1 - _NEWEST) * self._latency + _NEWEST * latency
            if self.is_expired(found):
                self.counts.expired += 1
                self.remove_items([found.item_key, *found.object_keys])
                found = Status.MISSING
        if isinstance(found, Status):
            self._answered(found, count=count_misses)
            self.counts.misses += count_misses
        else:
            self._answered(Status.OK)
        return found

    def is_expired(self, manifest: Manifest) -> bool:
        """Whether the tier's TTL has passed; a writer's clock that is ahead counts as just now."""
        return self.url.ttl is not None and self._wall_clock() - manifest.created > self.url.ttl

    def read(self, manifest: Manifest, runs: Sequence[PageRun], buffer: memoryview) -> list[Status]:
        """Read runs of pages into their places in `buffer`; see `RangeRead` about timeouts."""
        sizes = manifest.object_sizes
        reads = [
            RangeRead(
                manifest.object_keys[run.object_index],
                run.ranges,
                sizes[run.object_index],
                buffer[run.begin : run.begin + run.num_bytes],
            )
            for run in runs
        ]
        begin = time.perf_counter()
        statuses: list[Status] = []
        for batch in _batches(reads, lambda read: read.num_bytes):
            answer = self.call(partial(self.backend.get_ranges, batch))
            statuses += [answer] * len(batch) if isinstance(answer, Status) else answer
            if Status.TIMEOUT in statuses or Status.UNREACHABLE in statuses:
                break
        statuses += [statuses[-1]] * (len(reads) - len(statuses)) if statuses else []
        for trouble in set(statuses) - {Status.OK}:
            self._answered(trouble)
        done = sum(r.num_bytes for r, s in zip(reads, statuses, strict=True) if s is Status.OK)
        self.counts.bytes_read += done
        self.counts.read_seconds += time.perf_counter() - begin
        came = [run for run, got in zip(runs, statuses, strict=True) if got is Status.OK]
        self._room.touch(manifest, [run.object_index for run in reversed(came)])  # coldest first
        return statuses

    def estimate_seconds(self, num_bytes: int) -> float | None:
        """How long a load would take, by the median of the last ones; None before the second."""
        if len(self._seconds_per_byte) < _FEWEST_SAMPLES:
            return None
        return self._latency + num_bytes * statistics.median(self._seconds_per_byte)

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Tell how long a whole load took, from the question to K and V in their pages."""
        if num_bytes:
            self._seconds_per_byte.append(max(seconds - self._latency, 0.0) / num_bytes)

    def is_too_slow(self, num_bytes: int, recompute_seconds: float | None) -> bool:
        """Whether computing is expected to be faster than reading; counted."""
        estimate = self.estimate_seconds(num_bytes)
        if estimate is None or recompute_seconds is None:
            return False
        if self.url.prefer == "load" or estimate <= recompute_seconds:
            self._slow_in_a_row = 0
            return False
        self._slow_in_a_row += 1
        if self._slow_in_a_row % _PROBE_EVERY == 0:
            return False
        self.counts.skipped_slower += 1
        return True

    # --- writing ---------------------------------------------------------------------------------

    def write(self, manifest: Manifest, objects: Sequence[memoryview | None]) -> Status:
        """Store a segment: its objects first, its manifest last.

        Objects that are None stay away, as do regions that the policy does not admit. A segment
        that is there already (as whole) is left as it is.
        """
        if self.is_down():
            self.counts.skipped_down += 1
            return self._down_status
        before = self.call(lambda timeout: self.backend.get([manifest.item_key], timeout)[0])
        if isinstance(before, bytes):
            old = _parse(before)
            if old is not None and old.write_id == manifest.write_id:
                return Status.OK
            if old is not None and not self.is_expired(old) and self._is_whole(old):
                return Status.OK
            self.remove_items([manifest.item_key, *(old.object_keys if old else [])])
        elif before is not Status.MISSING:
            return self._answered(before)
        status = self._put(manifest, objects)
        if status is Status.FULL and self._room.drop(manifest.num_bytes):
            status = self._put(manifest, objects)
        if status is not Status.OK:
            self.remove_items([manifest.item_key, *manifest.object_keys])
        return self._answered(status)

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether every object of a stored segment is there; a region may have been dropped."""
        answer = self.call(lambda t: self.backend.sizes(f"d/{manifest.key}/", t))
        return not isinstance(answer, Status) and all(
            answer.get(key) == size
            for key, size in zip(manifest.object_keys, manifest.object_sizes, strict=True)
        )

    def _put(self, manifest: Manifest, objects: Sequence[memoryview | None]) -> Status:
        taken, refused = self._room.take(manifest, objects)
        self.counts.rejected += refused
        items = [
            ItemWrite(key, data)
            for i, (key, data) in enumerate(zip(manifest.object_keys, objects, strict=True))
            if i in taken and data is not None
        ]
        items.append(ItemWrite(manifest.item_key, manifest.to_bytes()))
        for batch in _batches(items, lambda item: len(item.data)):
            answer = self.call(partial(self.backend.put, batch))
            statuses = [answer] if isinstance(answer, Status) else answer
            failed = next((s for s in statuses if s is not Status.OK), None)
            if failed is not None:
                self._room.forget(manifest)
                return failed
        self.counts.segments_written += 1
        self.counts.bytes_written += sum(len(item.data) for item in items)
        return Status.OK

    def _list_objects(self) -> Mapping[str, int] | None:
        answer = self.call(lambda timeout: self.backend.sizes("d/", timeout))
        return None if isinstance(answer, Status) else answer

    def _evict(self, keys: Sequence[str], num_bytes: int) -> None:
        self.call(lambda timeout: self.backend.remove(keys, timeout))
        self.counts.evictions += 1
        self.counts.evicted_bytes += num_bytes

    # --- removing --------------------------------------------------------------------------------

    def remove(self, manifest: Manifest) -> Status:
        """Remove a segment: its manifest first."""
        self._room.forget(manifest)
        return self.remove_items([manifest.item_key, *manifest.object_keys])

    def remove_items(self, keys: Sequence[str]) -> Status:
        """Remove items by their keys in the engine; the first one's status."""
        answer = self.call(lambda timeout: self.backend.remove(keys, timeout))
        return answer if isinstance(answer, Status) else answer[0]

    @property
    def used_bytes(self) -> int:
        """Bytes of the segments known to be here."""
        return self._room.used_bytes

    def close(self) -> None:
        """Close the engine."""
        self.backend.close()


def _parse(data: bytes) -> Manifest | None:
    try:
        return Manifest.from_bytes(data)
    except (DamagedError, ValueError, KeyError, TypeError, IndexError):
        return None


def _batches(items: Sequence[_T], size: Callable[[_T], int]) -> list[list[_T]]:
    """Items in order, in groups of at most _BATCH_BYTES (or one item)."""
    groups: list[list[_T]] = []
    room = 0
    for item in items:
        if not groups or size(item) > room:
            groups.append([])
            room = _BATCH_BYTES
        groups[-1].append(item)
        room -= size(item)
    return groups
