"""Segments between the page pool and the tiers below it: read, checked, put into pages, written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from redknot.engine.needs import DocumentNeed
from redknot.engine.parts import SegmentParts
from redknot.engine.runner import Runner
from redknot.heads import HeadMap
from redknot.store import Expected, Loaded, Manifest, Missed, Segment, TieredStore
from redknot.store.layout import NeededTokens, SegmentShape
from redknot.store.manifest import new_write_id, seal
from redknot.store.pool_pages import gather_segment, scatter_segment

__all__ = ["Outline", "SegmentTiers"]

# Weight of the newest sample in the running estimate of seconds per FLOP.
_NEWEST = 0.3


@dataclass(frozen=True)
class Outline:
    """What is known of a segment before it is found: enough to ask a tier for it."""

    key: str
    num_tokens: int
    first_position: int
    hidden_layer: int | None = None


class SegmentTiers:
    """Moves whole segments, or the pages that a request needs, to and from the tiers.

    `parts` knows which pages of the segments lie in the pool.

    Parameters
    ----------
    runner : Runner
        Whose pool and model.
    store : TieredStore
        May have no tiers; then nothing is found and nothing is written.
    fingerprint : str
        Of the model.
    heads : HeadMap
        Decides which pages lie beside each other in what is written; any map can read them.
    """

    def __init__(
        self, runner: Runner, store: TieredStore, *, fingerprint: str, heads: HeadMap
    ) -> None:
        self._runner = runner
        self.store = store
        self._fingerprint = fingerprint
        self.parts = SegmentParts(runner.pool, heads, runner.decoder.sliding_windows)
        self._seconds_per_flop: float | None = None
        # By handle: which of a key's writes has these very K and V; two are never mixed.
        self._write_ids: dict[int, str] = {}

    # --- reading ---------------------------------------------------------------------------------

    def prefetch(self, outline: Outline, needed: NeededTokens | None = None) -> None:
        """Begin to read a segment on a thread."""
        self.store.prefetch(
            outline.key,
            self._expected(outline),
            needed,
            hidden=outline.hidden_layer is not None,
            recompute_seconds=self._recompute_seconds,
        )

    def load(
        self,
        outline: Outline,
        need: DocumentNeed | None,
        allocate: Callable[[int, int, NDArray[np.bool_] | None], int],
    ) -> tuple[Segment, str] | Missed:
        """Read a segment into new pages: the segment and where it came from, or why not.

        `allocate(num_tokens, first_position, present)` takes those pages that the request may read
        (None: all), and may raise BudgetError; what it reads later has a place, but is not read.
        """
        if not self.store:
            return Missed("")
        loaded = self._read(outline, None if need is None else need.now)
        if isinstance(loaded, Missed):
            return loaded
        started, manifest = time.perf_counter(), loaded.manifest
        if outline.hidden_layer is not None and loaded.hidden is None:
            return Missed(f"{loaded.tiers[-1].name}: stored without hidden states")
        pool = self._runner.pool
        held = None if need is None else self.parts.pages(need.all)
        handle = allocate(outline.num_tokens, outline.first_position, held)
        if need is not None and held is not None:
            self.parts.put(handle, held, self.parts.pages(need.now))
        self._write_ids[handle] = manifest.write_id
        scatter_segment(pool, handle, manifest.layout, loaded.selection, loaded.buffer)
        hidden = None
        if loaded.hidden is not None:
            dtype = self._runner.decoder.dtype
            hidden = torch.from_numpy(loaded.hidden).view(dtype).view(outline.num_tokens, -1)
            hidden = hidden.to(self._runner.decoder.device)
        where = _where_from(loaded, loaded.done(time.perf_counter() - started))
        segment = Segment(
            key=outline.key,
            handle=handle,
            first_position=outline.first_position,
            num_tokens=outline.num_tokens,
            offline_flops=manifest.offline_flops,
            offline_seconds=manifest.offline_seconds,
            hidden=hidden,
            hidden_layer=outline.hidden_layer,
            origin=where,
        )
        return segment, where

    def complete(
        self,
        segment: Segment,
        need: DocumentNeed | None,
        hold: Callable[[Segment, NDArray[np.bool_]], None],
    ) -> str | None:
        """Read what a request needs of a segment of which some pages are not in the pool.

        `hold` gives pages a place, and may raise BudgetError. Returns where they came from ("":
        nothing was missing), or None when they could not be read; the segment is then of no use to
        the request.
        """
        handle = segment.handle
        missing = self.parts.not_valid(handle, None if need is None else need.now)
        if missing is not None and not self.store:
            return None
        homeless = self.parts.not_held(handle, None if need is None else need.all)
        if homeless is not None:
            hold(segment, homeless)
        if missing is None:
            return ""
        page_size = self._runner.pool.page_size
        flat = missing.reshape(-1, missing.shape[2])
        tokens = np.repeat(flat, page_size, axis=1)[:, : segment.num_tokens]
        wanted = NeededTokens(tokens, np.arange(len(flat)).reshape(missing.shape[:2]))
        outline = Outline(segment.key, segment.num_tokens, segment.first_position)
        loaded = self._read(outline, wanted)
        if isinstance(loaded, Missed) or loaded.manifest.write_id != self._write_ids.get(handle):
            return None
        started, layout = time.perf_counter(), loaded.manifest.layout
        scatter_segment(self._runner.pool, handle, layout, loaded.selection, loaded.buffer)
        self.parts.fill(handle, missing)
        return _where_from(loaded, loaded.done(time.perf_counter() - started))

    def can_come_back(self, segment: Segment) -> bool:
        """Whether a tier has the very K and V that a segment has, as far as its manifest tells."""
        write_id = self._write_ids.get(segment.handle)
        return write_id is not None and self.store.holds(segment.key, write_id)

    def forget(self, segment: Segment) -> None:
        """The segment's pages were given back."""
        self.parts.forget(segment.handle)
        self._write_ids.pop(segment.handle, None)

    def contains(self, outline: Outline) -> bool:
        """Whether a tier has the segment, as far as its manifest tells."""
        return self.store.contains(outline.key, self._expected(outline))

    def _read(self, outline: Outline, needed: NeededTokens | None) -> Loaded | Missed:
        return self.store.load(
            outline.key,
            self._expected(outline),
            needed,
            hidden=outline.hidden_layer is not None,
            recompute_seconds=self._recompute_seconds,
        )

    def _expected(self, outline: Outline) -> Expected:
        shape, pool = self._runner.decoder.shape, self._runner.pool
        return Expected(
            fingerprint=self._fingerprint,
            dtype=_dtype_name(pool.k_cache.dtype),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            num_tokens=outline.num_tokens,
            row_bytes=shape.head_dim * pool.k_cache.dtype.itemsize,
            first_position=outline.first_position,
        )

    def _recompute_seconds(self, manifest: Manifest) -> float | None:
        """What computing a segment would take here; before anything was, what it took elsewhere."""
        if self._seconds_per_flop is None:
            return manifest.offline_seconds
        return manifest.offline_flops * self._seconds_per_flop

    # --- writing ---------------------------------------------------------------------------------

    def computed(self, flops: float, seconds: float) -> None:
        """Take note of how long some computing took."""
        if flops:
            old, rate = self._seconds_per_flop, seconds / flops
            self._seconds_per_flop = rate if old is None else (1 - _NEWEST) * old + _NEWEST * rate

    def save(self, segment: Segment) -> None:
        """Copy a segment out of its pages; a thread writes it to every tier."""
        if not self.store or self.parts.is_partial(segment.handle):
            return
        expected = self._expected(Outline(segment.key, segment.num_tokens, segment.first_position))
        pool = self._runner.pool
        shape = SegmentShape(
            expected.num_layers,
            expected.num_kv_heads,
            expected.num_tokens,
            pool.page_size,
            expected.row_bytes,
        )
        regions = self.parts.regions(shape.num_tokens)
        manifest = Manifest(
            key=segment.key,
            fingerprint=self._fingerprint,
            dtype=expected.dtype,
            shape=shape,
            regions=regions,
            first_position=segment.first_position,
            offline_flops=segment.offline_flops,
            offline_seconds=segment.offline_seconds,
            created=time.time(),
            write_id=new_write_id(),
            checksums=np.empty(0, dtype="<u8"),
            hidden_layer=-1 if segment.hidden_layer is None else segment.hidden_layer,
            hidden_bytes=0
            if segment.hidden is None
            else segment.hidden.shape[1] * segment.hidden.dtype.itemsize,
        )
        self._write_ids[segment.handle] = manifest.write_id
        pages = gather_segment(pool, segment.handle, manifest.layout)
        hidden = None
        if segment.hidden is not None:
            hidden = segment.hidden.detach().cpu().contiguous().view(torch.uint8).numpy().ravel()
        self.store.save(*seal(manifest, pages, hidden))


def _where_from(loaded: Loaded, seconds: float) -> str:
    names = " and ".join(dict.fromkeys(tier.name for tier in loaded.tiers))
    total = loaded.manifest.num_bytes
    return f"loaded from {names}: {loaded.num_bytes:,} of {total:,} bytes in {1e3 * seconds:.1f} ms"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
