"""One tier: a storage engine behind a deadline, with a capacity, counts and running estimates."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from redknot.store.backend import ItemWrite, RangeRead, Status, StorageBackend
from redknot.store.eviction import make_policy
from redknot.store.layout import REGIONS, PageRun
from redknot.store.manifest import DamagedError, Manifest
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
_RELIST_SECONDS = 10.0


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


@dataclass
class _Unit:
    """One region of one segment: what a tier keeps or drops as a whole."""

    object_keys: list[str]
    num_bytes: int


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
        self._policy = make_policy(url.policy, url.capacity or 1 << 62)
        self._units: dict[str, _Unit] = {}
        self._used = 0
        self._listed_at = -_RELIST_SECONDS
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
        with self._lock:
            for run, got in reversed(list(zip(runs, statuses, strict=True))):  # the coldest first
                if got is Status.OK:
                    self._policy.touch(self._unit_name(manifest, run.object_index))
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
        if status is Status.FULL and self._make_room(manifest.num_bytes, at_least_one=True):
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
        units = {
            name: (indices, size)
            for name, (indices, size) in _units(manifest).items()
            if all(objects[index] is not None for index in indices)
        }
        with self._lock:
            for name, (indices, size) in units.items():  # the room is taken before it is filled
                cost = manifest.offline_seconds * size / manifest.num_bytes
                if self._admit(name, size, cost):
                    unit = _Unit([manifest.object_keys[i] for i in indices], size)
                    self._insert(name, unit, cost)
                else:
                    self.counts.rejected += 1
            taken = [i for name in units if name in self._units for i in units[name][0]]
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
                self._forget(manifest)
                return failed
        self.counts.segments_written += 1
        self.counts.bytes_written += sum(len(item.data) for item in items)
        return Status.OK

    def _forget(self, manifest: Manifest) -> None:
        """Count a segment out."""
        with self._lock:
            for name in _units(manifest):
                unit = self._units.pop(name, None)
                if unit is not None:
                    self._used -= unit.num_bytes
                    self._policy.remove(name)

    def _insert(self, name: str, unit: _Unit, cost: float) -> None:
        old = self._units.get(name)
        self._used += unit.num_bytes - (old.num_bytes if old else 0)
        self._units[name] = unit
        self._policy.insert(name, unit.num_bytes, cost)

    def _admit(self, name: str, num_bytes: int, cost: float) -> bool:
        capacity = self.url.capacity
        self._policy.touch(name)
        if capacity is None:
            return True
        self._list_others()
        if num_bytes > capacity:
            return False
        if not self._policy.admit(name, num_bytes, cost, capacity - self._used):
            return False
        return self._make_room(num_bytes)

    def _make_room(self, num_bytes: int, *, at_least_one: bool = False) -> bool:
        """Drop units until `num_bytes` fit; whether they do (or, with a full disk, may)."""
        capacity = self.url.capacity
        with self._lock:
            target = capacity - num_bytes if capacity is not None else self._used - num_bytes
            dropped = 0
            while self._used > target:
                name = self._policy.victim()
                if name is None:
                    break
                self._drop(name)
                dropped += 1
            return dropped > 0 if at_least_one else self._used <= target

    def _drop(self, name: str) -> None:
        unit = self._units.pop(name)
        self._policy.remove(name)
        self._used -= unit.num_bytes
        key = name.rsplit("/", 1)[0]
        keys = list(unit.object_keys)
        if not any(f"{key}/{region}" in self._units for region in (*REGIONS, "hidden")):
            keys.insert(0, f"m/{key}")
        self.call(lambda timeout: self.backend.remove(keys, timeout))
        self.counts.evictions += 1
        self.counts.evicted_bytes += unit.num_bytes

    def _list_others(self) -> None:
        """Count in what was there at the start, and what other processes have written."""
        if time.monotonic() - self._listed_at < _RELIST_SECONDS:
            return
        self._listed_at = time.monotonic()
        answer = self.call(lambda timeout: self.backend.sizes("d/", timeout))
        if isinstance(answer, Status):
            return
        found: dict[str, _Unit] = {}
        for item, size in answer.items():
            _, key, _, name = item.split("/")
            unit = found.setdefault(f"{key}/{name.rsplit('-', 1)[0]}", _Unit([], 0))
            unit.object_keys.append(item)
            unit.num_bytes += size
        for gone in [name for name in self._units if name not in found]:
            self._used -= self._units.pop(gone).num_bytes
            self._policy.remove(gone)
        for name, unit in found.items():
            if name not in self._units:
                self._insert(name, unit, 0.0)

    # --- removing --------------------------------------------------------------------------------

    def remove(self, manifest: Manifest) -> Status:
        """Remove a segment: its manifest first."""
        self._forget(manifest)
        return self.remove_items([manifest.item_key, *manifest.object_keys])

    def remove_items(self, keys: Sequence[str]) -> Status:
        """Remove items by their keys in the engine; the first one's status."""
        answer = self.call(lambda timeout: self.backend.remove(keys, timeout))
        return answer if isinstance(answer, Status) else answer[0]

    def _unit_name(self, manifest: Manifest, object_index: int) -> str:
        regions = manifest.layout.object_regions
        region = REGIONS[regions[object_index]] if object_index < len(regions) else "hidden"
        return f"{manifest.key}/{region}"

    @property
    def used_bytes(self) -> int:
        """Bytes of the segments known to be here."""
        return self._used

    def close(self) -> None:
        """Close the engine."""
        self.backend.close()


def _units(manifest: Manifest) -> dict[str, tuple[list[int], int]]:
    """Object indices and bytes of each unit of a segment, coldest first."""
    units: dict[str, tuple[list[int], int]] = {}
    layout = manifest.layout
    for number, region in enumerate(REGIONS):
        indices = [i for i, r in enumerate(layout.object_regions) if r == number]
        if indices:
            size = sum(layout.object_sizes[i] for i in indices)
            units[f"{manifest.key}/{region}"] = (indices, size)
    if manifest.hidden_layer >= 0:
        units[f"{manifest.key}/hidden"] = ([layout.num_objects], manifest.num_hidden_bytes)
    return units


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
