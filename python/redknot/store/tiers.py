"""The tiers below the page pool, nearest first: host memory, disk, a server that machines share."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from redknot.errors import InputError, StoreDamagedError, StoreError
from redknot.store.backend import Status, UnusableBackend
from redknot.store.layout import NeededTokens
from redknot.store.manifest import Manifest
from redknot.store.reading import Loaded, Reading
from redknot.store.tier import Tier
from redknot.store.url import open_backend, parse_url
from redknot.store.workers import Workers

__all__ = ["Expected", "Loaded", "Missed", "TieredStore", "expected_of", "open_tiers"]

logger = logging.getLogger("redknot.store")

# Bytes that wait to be written, or that were read ahead, at most.
_QUEUE_BYTES = 512 << 20
# How long `save` waits for room in the queue, and closing for the queue, before giving up.
_SAVE_WAIT_SECONDS, _CLOSE_WAIT_SECONDS = 30.0, 60.0
_PREFETCH_THREADS = 2


@dataclass(frozen=True)
class Expected:
    """What a segment must be, so that nothing of another model or place is ever taken for it."""

    fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    num_tokens: int
    row_bytes: int
    first_position: int

    def matches(self, key: str, manifest: Manifest) -> bool:
        """Whether a manifest is of this segment."""
        return manifest.key == key and expected_of(manifest) == self


def expected_of(manifest: Manifest) -> Expected:
    """What a manifest says of itself."""
    shape = manifest.shape
    return Expected(
        manifest.fingerprint,
        manifest.dtype,
        shape.num_layers,
        shape.num_kv_heads,
        shape.num_tokens,
        shape.row_bytes,
        manifest.first_position,
    )


@dataclass(frozen=True)
class Missed:
    """Why a segment could not be read, in words for people; empty when there is no tier."""

    reason: str


@dataclass
class _Ahead:
    future: Future[Loaded | Missed]
    wanted: NeededTokens | None
    num_bytes: int


class TieredStore:
    """Reads segments from the nearest tier that has them, and writes them to all tiers.

    Parameters
    ----------
    tiers : sequence of Tier
        Nearest first; may be empty.
    """

    def __init__(self, tiers: Sequence[Tier] = ()) -> None:
        self.tiers = tuple(tiers)
        self._writer = Workers("redknot-write-behind", 1)
        self._reader = Workers("redknot-prefetch", _PREFETCH_THREADS)
        self._ahead: dict[str, _Ahead] = {}
        self._room = threading.Condition()
        self._queued_bytes = 0
        self.writes_dropped = 0
        # Runs at exit too, while the writer (a daemon thread) is still alive.
        self._finalizer = weakref.finalize(self, _close, self.tiers, self._writer)

    def __bool__(self) -> bool:
        return bool(self.tiers)

    # --- reading ---------------------------------------------------------------------------------

    def load(
        self,
        key: str,
        expected: Expected,
        wanted: NeededTokens | None = None,
        *,
        hidden: bool = False,
        recompute_seconds: Callable[[Manifest], float | None] = lambda manifest: None,
    ) -> Loaded | Missed:
        """Read pages of a segment.

        Parameters
        ----------
        key : str
        expected : Expected
            A manifest of anything else is refused.
        wanted : NeededTokens, optional
            What to read; None: all. Whole pages are read.
        hidden : bool
            Whether the hidden states are wanted too.
        recompute_seconds : callable
            What computing the segment is expected to take; a tier that is slower is skipped.
        """
        with self._room:
            ahead = self._ahead.pop(key, None)
            if ahead is not None:
                self._release(ahead.num_bytes)
        if ahead is not None and _covers(ahead.wanted, wanted):
            return ahead.future.result()
        return self._load(key, expected, wanted, hidden, recompute_seconds)

    def contains(self, key: str, expected: Expected) -> bool:
        """Whether a tier has the segment, as far as its manifest tells; no miss is counted."""
        for tier in self.tiers:
            found = tier.manifest(key, count_misses=False)
            if isinstance(found, Manifest) and expected.matches(key, found):
                return True
        return False

    def holds(self, key: str, write_id: str) -> bool:
        """Whether a tier has what one write of a segment has put there; no miss is counted."""
        found = (tier.manifest(key, count_misses=False) for tier in self.tiers)
        return any(isinstance(m, Manifest) and m.write_id == write_id for m in found)

    def prefetch(
        self,
        key: str,
        expected: Expected,
        wanted: NeededTokens | None = None,
        *,
        hidden: bool = False,
        recompute_seconds: Callable[[Manifest], float | None] = lambda manifest: None,
    ) -> bool:
        """Begin to read on a thread what `load` will ask for; False when too much is under way."""
        if not self.tiers:
            return False
        num_bytes = 2 * expected.row_bytes * expected.num_tokens
        num_bytes *= expected.num_layers * expected.num_kv_heads
        with self._room:
            if key in self._ahead:
                return True
            if self._queued_bytes + num_bytes > _QUEUE_BYTES:
                return False
            self._queued_bytes += num_bytes
            future = self._reader.submit(
                lambda: self._load(key, expected, wanted, hidden, recompute_seconds)
            )
            self._ahead[key] = _Ahead(future, wanted, num_bytes)
        return True

    def forget_prefetched(self) -> None:
        """Drop what was read ahead and not asked for."""
        with self._room:
            for ahead in self._ahead.values():
                ahead.future.cancel()
                self._release(ahead.num_bytes)
            self._ahead.clear()

    def _load(
        self,
        key: str,
        expected: Expected,
        wanted: NeededTokens | None,
        hidden: bool,
        recompute_seconds: Callable[[Manifest], float | None],
    ) -> Loaded | Missed:
        started = time.perf_counter()
        reading: Reading | None = None
        reasons = []
        for tier in self.tiers:
            manifest = tier.manifest(key)
            if isinstance(manifest, Manifest) and not expected.matches(key, manifest):
                tier.counts.fail(Status.CORRUPT)
                tier.counts.misses += 1
                manifest = Status.CORRUPT
            if isinstance(manifest, Status):
                reasons.append(f"{tier.name}: {manifest.value}")
                _report(tier, key, manifest)
                continue
            if reading is None or reading.manifest.write_id != manifest.write_id:
                reading = Reading(manifest, wanted, hidden)
            recompute = recompute_seconds(manifest)
            if tier.is_too_slow(reading.missing_bytes, recompute):
                estimate = tier.estimate_seconds(reading.missing_bytes)
                reasons.append(
                    f"{tier.name}: reading {reading.missing_bytes:,} bytes would take about "
                    f"{1e3 * (estimate or 0):.1f} ms, computing {1e3 * (recompute or 0):.1f} ms"
                )
                continue
            trouble = reading.read_from(tier)
            if trouble is None:
                tier.counts.hits += 1
                self._promote(reading)
                return reading.loaded(time.perf_counter() - started)
            tier.counts.misses += 1
            reasons.append(f"{tier.name}: {trouble.value}")
            if trouble is Status.CORRUPT or trouble is Status.SHORT:
                tier.remove(manifest)
            _report(tier, key, trouble)
        return Missed("; ".join(reasons))

    def _promote(self, reading: Reading) -> None:
        """Write what was read whole to the tiers nearer than where it came from."""
        nearer = self.tiers[: self.tiers.index(reading.sources[-1])]
        objects = reading.whole_objects()
        if nearer and any(item is not None for item in objects):
            self._enqueue(reading.manifest, objects, nearer, wait=False)

    # --- writing ---------------------------------------------------------------------------------

    def save(self, manifest: Manifest, objects: Sequence[memoryview | None]) -> None:
        """Write a segment to every tier, on a thread; waits only for room in the queue."""
        if self.tiers:
            self._enqueue(manifest, list(objects), self.tiers, wait=True)

    def _enqueue(
        self,
        manifest: Manifest,
        objects: Sequence[memoryview | None],
        tiers: Sequence[Tier],
        *,
        wait: bool,
    ) -> None:
        num_bytes = sum(len(item) for item in objects if item is not None)
        with self._room:
            fits = self._room.wait_for(
                lambda: not self._queued_bytes or self._queued_bytes + num_bytes <= _QUEUE_BYTES,
                timeout=_SAVE_WAIT_SECONDS if wait else 0,
            )
            if not fits:
                self.writes_dropped += 1
                if wait:
                    logger.warning(
                        "store: segment %s is not written: %d bytes wait already",
                        manifest.key[:12],
                        self._queued_bytes,
                    )
                return
            self._queued_bytes += num_bytes
        self._writer.submit(lambda: self._write(manifest, objects, tiers, num_bytes))

    def _write(
        self,
        manifest: Manifest,
        objects: Sequence[memoryview | None],
        tiers: Sequence[Tier],
        num_bytes: int,
    ) -> None:
        try:
            for tier in tiers:
                was_down = tier.is_down()
                status = tier.write(manifest, objects)
                if status is not Status.OK and not was_down:
                    logger.warning(
                        "store %s: segment %s could not be written: %s",
                        tier.name,
                        manifest.key[:12],
                        status.value,
                    )
        except Exception:
            logger.exception("store: segment %s could not be written", manifest.key[:12])
        finally:
            with self._room:
                self._release(num_bytes)

    def _release(self, num_bytes: int) -> None:
        self._queued_bytes -= num_bytes
        self._room.notify_all()

    def flush(self, timeout: float = _CLOSE_WAIT_SECONDS) -> bool:
        """Wait until everything saved so far is written; whether it is."""
        return _flush(self._writer, timeout)

    def close(self) -> None:
        """Write what waits, then close the engines."""
        self.forget_prefetched()
        self._finalizer()


def _report(tier: Tier, key: str, status: Status) -> None:
    """One line for each fault; a tier that is down is announced once, not for every segment."""
    if status is Status.MISSING:
        return
    if tier.is_down():
        if tier.announce_down():
            logger.warning(
                "store %s: segment %s: %s; counted as a miss, the tier is left alone for a while",
                tier.name,
                key[:12],
                status.value,
            )
        return
    logger.warning("store %s: segment %s: %s; counted as a miss", tier.name, key[:12], status.value)


def _covers(have: NeededTokens | None, want: NeededTokens | None) -> bool:
    return have is None or have.same(want)


def _flush(writer: Workers, timeout: float) -> bool:
    """Wait for the writer's queue: its one thread takes jobs in order."""
    try:
        writer.submit(lambda: None).result(timeout=timeout)
    except TimeoutError:
        return False
    return True


def _close(tiers: Sequence[Tier], writer: Workers) -> None:
    if tiers and not _flush(writer, _CLOSE_WAIT_SECONDS):
        logger.warning("store: some segments could not be written in %.0f s", _CLOSE_WAIT_SECONDS)
    for tier in tiers:
        tier.close()


def open_tiers(urls: str | Sequence[str]) -> tuple[Tier, ...]:
    """Open the tiers of a store, nearest first.

    `mem:` without a capacity is the page pool itself, which is always there: no tier.

    Raises
    ------
    InputError, StoreError
        For a URL that means nothing, or a store that cannot be opened; nothing stays open.
    """
    parsed = [parse_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
    tiers: list[Tier] = []
    for number, url in enumerate(parsed):
        if url.scheme == "mem" and url.capacity is None:
            if number:
                raise InputError("mem: behind another tier needs a size: mem:?capacity=4GiB")
            continue
        try:
            tiers.append(Tier(open_backend(url), url))
        except StoreDamagedError as error:
            # A damaged cache must not keep its users from working without one.
            logger.error("store %s: %s; every segment is computed anew", url.scheme, error)
            tiers.append(Tier(UnusableBackend(url.scheme), url))
        except StoreError:
            for tier in tiers:
                tier.close()
            raise
    return tuple(tiers)
