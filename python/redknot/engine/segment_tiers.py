"""Segments between the page pool and the tiers below it: read, checked, put into pages, written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from redknot.engine.runner import Runner
from redknot.heads import HeadMap
from redknot.store import Expected, Loaded, Manifest, Missed, Segment, TieredStore
from redknot.store.layout import NeededTokens, Regions, SegmentShape
from redknot.store.manifest import new_write_id, seal
from redknot.store.pool_pages import gather_segment, scatter_segment, zero_segment

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


@dataclass(frozen=True)
class _Partial:
    """A segment in the pool of which some pages were not read."""

    write_id: str
    page_size: int
    absent: NDArray[np.bool_]


class SegmentTiers:
    """Moves whole segments, or the pages that a request needs, to and from the tiers.

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
        windows, sinks = heads.rules(runner.decoder.sliding_windows)
        self._rules = (heads.is_global, windows, sinks)
        self._seconds_per_flop: float | None = None
        self._partial: dict[int, _Partial] = {}  # by handle

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
        needed: NeededTokens | None,
        allocate: Callable[[int, int], int],
    ) -> tuple[Segment, str] | Missed:
        """Read a segment into new pages: the segment and where it came from, or why not.

        `allocate(num_tokens, first_position)` takes the pages, and may raise BudgetError.
        """
        if not self.store:
            return Missed("")
        loaded = self._read(outline, needed)
        if isinstance(loaded, Missed):
            return loaded
        started, manifest = time.perf_counter(), loaded.manifest
        if outline.hidden_layer is not None and loaded.hidden is None:
            return Missed(f"{loaded.tiers[-1].name}: stored without hidden states")
        pool, layout = self._runner.pool, manifest.layout
        handle = allocate(outline.num_tokens, outline.first_position)
        is_partial = len(loaded.selection) < len(layout.order)
        if is_partial:
            zero_segment(pool, handle, manifest.shape.num_layers)
        scatter_segment(pool, handle, layout, loaded.selection, loaded.buffer)
        if is_partial:
            absent = np.ones(len(layout.order), dtype=bool)
            absent[layout.order[loaded.selection]] = False
            self._partial[handle] = _Partial(
                manifest.write_id, manifest.shape.page_size, absent.reshape(manifest.shape.pages)
            )
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

    def complete(self, segment: Segment, needed: NeededTokens | None) -> str | None:
        """Read what a request needs of a segment that was read in part.

        Returns where it came from ("": nothing was missing), or None when it could not be read;
        the segment is then of no use to the request.
        """
        partial = self._partial.get(segment.handle)
        if partial is None:
            return ""
        shape = partial.absent.shape
        wanted = partial.absent
        if needed is not None:
            wanted = wanted & needed.pages(partial.page_size)
        if not wanted.any():
            return ""
        flat = wanted.reshape(-1, shape[2])
        tokens = np.repeat(flat, partial.page_size, axis=1)[:, : segment.num_tokens]
        missing = NeededTokens(tokens, np.arange(len(flat)).reshape(shape[:2]))
        outline = Outline(segment.key, segment.num_tokens, segment.first_position)
        loaded = self._read(outline, missing)
        if isinstance(loaded, Missed) or loaded.manifest.write_id != partial.write_id:
            return None
        started, layout = time.perf_counter(), loaded.manifest.layout
        scatter_segment(self._runner.pool, segment.handle, layout, loaded.selection, loaded.buffer)
        absent = partial.absent & ~wanted
        if absent.any():
            self._partial[segment.handle] = _Partial(partial.write_id, partial.page_size, absent)
        else:
            del self._partial[segment.handle]
        return _where_from(loaded, loaded.done(time.perf_counter() - started))

    def forget(self, segment: Segment) -> None:
        """The segment's pages were given back."""
        self._partial.pop(segment.handle, None)

    def contains(self, outline: Outline) -> bool:
        """Whether a tier has the segment, as far as its manifest tells."""
        return self.store.contains(outline.key, self._expected(outline))

    def is_partial(self, segment: Segment) -> bool:
        """Whether some of the segment's pages were not read."""
        return segment.handle in self._partial

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
        if not self.store or self.is_partial(segment):
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
        regions = Regions.of_heads(*self._rules, pool.page_size, shape.num_pages)
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
