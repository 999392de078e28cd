"""One segment on its way from a tier, or from several, into one buffer: read and checked."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redknot.store.backend import Status
from redknot.store.layout import NeededTokens, PageRun
from redknot.store.manifest import Manifest, hash_pages
from redknot.store.tier import Tier

__all__ = ["Loaded", "Reading", "read_segment"]


@dataclass(frozen=True)
class Loaded:
    """Pages of a segment, read and checked.

    Attributes
    ----------
    manifest : Manifest
    selection : int64 [num_pages_read]
        Their places in storage order.
    buffer : uint8 [bytes]
        Page behind page.
    hidden : uint8 [num_tokens * hidden_bytes], optional
        The hidden states, if they were asked for and are stored.
    tiers : tuple of Tier
        Where the bytes came from.
    seconds : float
        From the question to checked bytes.
    """

    manifest: Manifest
    selection: NDArray[np.int64]
    buffer: NDArray[np.uint8]
    hidden: NDArray[np.uint8] | None
    tiers: tuple[Tier, ...]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes that were read."""
        return len(self.buffer) + (len(self.hidden) if self.hidden is not None else 0)

    def done(self, seconds: float) -> float:
        """K and V are where they are needed, which took so long; returns the whole load's time."""
        whole = self.seconds + seconds
        for tier in self.tiers:
            tier.observe(self.num_bytes, whole / len(self.tiers))
        return whole


class Reading:
    """One segment on its way from one or more tiers into one buffer."""

    def __init__(self, manifest: Manifest, wanted: NeededTokens | None, hidden: bool) -> None:
        self.manifest = manifest
        layout = manifest.layout
        pages = None if wanted is None else wanted.pages(manifest.shape.page_size)
        self.selection = layout.selection(pages)
        self.runs = layout.runs(self.selection)
        num_bytes = sum(run.num_bytes for run in self.runs)
        if hidden and manifest.hidden_layer >= 0:
            size = manifest.num_hidden_bytes
            self.runs.append(PageRun(layout.num_objects, ((0, size),), num_bytes, size))
        self.kv_bytes = num_bytes
        # After a timeout a late answer may still be written to it: it is never used again then.
        self.buffer = np.empty(sum(run.num_bytes for run in self.runs), dtype=np.uint8)
        self._missing = list(range(len(self.runs)))
        self.sources: list[Tier] = []

    @property
    def missing_bytes(self) -> int:
        """Bytes that no tier has given yet."""
        return sum(self.runs[i].num_bytes for i in self._missing)

    def read_from(self, tier: Tier) -> Status | None:
        """Read what is missing; None when nothing is missing any more, else what was wrong."""
        if not self._missing:  # of a document that the request does not see, nothing is read
            self.sources = self.sources or [tier]
            return None
        runs = [self.runs[i] for i in self._missing]
        statuses = tier.read(self.manifest, runs, self.buffer.data)
        done = [i for i, s in zip(self._missing, statuses, strict=True) if s is Status.OK]
        damaged = not all(self._is_sound(i) for i in done)
        if damaged:
            tier.counts.fail(Status.CORRUPT)
        if damaged or Status.TIMEOUT in statuses:
            self.buffer = np.empty_like(self.buffer)
            self._missing, self.sources = list(range(len(self.runs))), []
            return Status.CORRUPT if damaged else Status.TIMEOUT
        if done:
            self.sources.append(tier)
        self._missing = [i for i in self._missing if i not in done]
        return next((s for s in statuses if s is not Status.OK), None)

    def _is_sound(self, index: int) -> bool:
        """Whether every page of a run has its checksum."""
        run, layout = self.runs[index], self.manifest.layout
        data = self.buffer.data[run.begin : run.begin + run.num_bytes]
        if run.object_index == layout.num_objects:
            seeds, begin, sizes = self.manifest.hidden_spans()
            stored = self.manifest.checksums[len(layout.order) :]
            return bool((hash_pages(data, begin, sizes, seeds) == stored).all())
        pages, begin, sizes = layout.page_spans(self.selection)
        low, high = np.searchsorted(begin, [run.begin, run.begin + run.num_bytes])
        found = hash_pages(data, begin[low:high] - run.begin, sizes[low:high], pages[low:high])
        return bool((found == self.manifest.checksums[self.selection[low:high]]).all())

    def whole_objects(self) -> list[memoryview | None]:
        """Objects that were read whole, for a nearer tier."""
        objects: list[memoryview | None] = [None] * len(self.manifest.object_keys)
        for run in self.runs:
            if run.num_bytes == self.manifest.object_sizes[run.object_index]:
                data = self.buffer.data[run.begin : run.begin + run.num_bytes]
                objects[run.object_index] = data
        return objects

    def loaded(self, seconds: float) -> Loaded:
        """What was read, and that it took so long."""
        hidden = self.buffer[self.kv_bytes :] if len(self.buffer) > self.kv_bytes else None
        return Loaded(
            self.manifest,
            self.selection,
            self.buffer[: self.kv_bytes],
            hidden,
            tuple(self.sources),
            seconds,
        )


def read_segment(tier: Tier, manifest: Manifest) -> Loaded | Status:
    """All of a segment of one tier, checked; nothing is counted as an engine's, or removed."""
    started = time.perf_counter()
    reading = Reading(manifest, None, hidden=True)
    trouble = reading.read_from(tier)
    return trouble if trouble is not None else reading.loaded(time.perf_counter() - started)
