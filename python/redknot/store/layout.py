"""Where every page of a stored segment lies: regions by head class, each in objects of its own.

A stored *page* is `page_size` tokens (fewer at the segment's end) of one KV head of one layer:
their K rows, then their V rows. Pages are grouped into four regions, and a region into objects of
whole layers, ordered by (layer, head, page):

    global   every page of the heads that need the whole context
    sink     first pages of local heads
    window   last pages of local heads, as far as their window reaches
    middle   the rest of local heads; the first to become cold

Any head map can be served from any layout; one like the writer's reads the longest runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MIDDLE",
    "REGIONS",
    "NeededTokens",
    "PageRun",
    "Regions",
    "SegmentLayout",
    "SegmentShape",
]

# Coldest first. The order is part of the format: a page's region is stored by its number.
REGIONS = ("middle", "window", "sink", "global")
MIDDLE, _WINDOW, _SINK, _GLOBAL = range(4)

# An object holds whole layers and is closed when it has this many bytes: below every engine's limit
# for one item (Redis: 512 MiB), long enough that one request each costs nothing.
_OBJECT_BYTES = 32 << 20


@dataclass(frozen=True)
class SegmentShape:
    """Shape of a stored segment.

    Attributes
    ----------
    num_layers, num_kv_heads, num_tokens, page_size : int
        A page holds `page_size` tokens of one KV head of one layer.
    row_bytes : int
        Bytes of one K (or V) row: head_dim * bytes per element.
    """

    num_layers: int
    num_kv_heads: int
    num_tokens: int
    page_size: int
    row_bytes: int

    @property
    def num_pages(self) -> int:
        """Pages of one head."""
        return -(-self.num_tokens // self.page_size)

    @property
    def pages(self) -> tuple[int, int, int]:
        """Shape of every matrix of pages: (num_layers, num_kv_heads, num_pages)."""
        return self.num_layers, self.num_kv_heads, self.num_pages

    def page_tokens(self) -> NDArray[np.int64]:
        """Tokens [num_pages] of each page of a head."""
        begin = np.arange(self.num_pages, dtype=np.int64) * self.page_size
        return np.minimum(self.page_size, self.num_tokens - begin)


@dataclass(frozen=True)
class Regions:
    """How many pages of each head are its sink and its window.

    Integer matrices [num_layers, num_kv_heads]; `first_pages` < 0 marks a global head.
    """

    first_pages: NDArray[np.int32]
    last_pages: NDArray[np.int32]

    @staticmethod
    def of_heads(
        is_global: NDArray[np.bool_],
        windows: NDArray[np.int32],
        sinks: NDArray[np.int32],
        page_size: int,
        num_pages: int,
    ) -> Regions:
        """Regions of a head map's rules; a window that begins inside a page takes all of it."""
        first = -(-sinks.astype(np.int64) // page_size)
        last = -(-np.maximum(windows.astype(np.int64), 0) // page_size) + 1
        first, last = np.minimum(first, num_pages), np.minimum(last, num_pages)
        everything = is_global | (windows < 0)
        return Regions(
            np.where(everything, -1, first).astype(np.int32),
            np.where(everything, 0, last).astype(np.int32),
        )

    def of_pages(self, num_pages: int) -> NDArray[np.uint8]:
        """Region number of every page [num_layers, num_kv_heads, num_pages]."""
        page = np.arange(num_pages)
        first, last = self.first_pages[..., None], self.last_pages[..., None]
        region = np.where(page >= num_pages - last, _WINDOW, MIDDLE)
        region = np.where(page < first, _SINK, region)
        return np.where(first < 0, _GLOBAL, region).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class NeededTokens:
    """Which tokens of each head a request reads.

    Attributes
    ----------
    tokens : bool [num_groups, num_tokens]
        Heads that need the same tokens share a group.
    group : integers [num_layers, num_kv_heads]
        Group of each head.
    """

    tokens: NDArray[np.bool_]
    group: NDArray[np.int64]

    def pages(self, page_size: int) -> NDArray[np.bool_]:
        """Pages [num_layers, num_kv_heads, pages] that hold a needed token."""
        starts = np.arange(0, self.tokens.shape[1], page_size)
        return np.logical_or.reduceat(self.tokens, starts, axis=1)[self.group]

    def whole_pages(self, page_size: int) -> NeededTokens:
        """All tokens of every page of `page_size` tokens that holds a needed one."""
        starts = np.arange(0, self.tokens.shape[1], page_size)
        pages = np.logical_or.reduceat(self.tokens, starts, axis=1)
        tokens = np.repeat(pages, page_size, axis=1)[:, : self.tokens.shape[1]]
        return NeededTokens(tokens, self.group)

    def same(self, other: NeededTokens | None) -> bool:
        """Whether both name the very same tokens."""
        return (
            other is not None
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.group, other.group)
        )


@dataclass(frozen=True)
class PageRun:
    """What to read of one object for some pages.

    `ranges` (offset, length) lie in the object, `begin` is where their bytes start in the buffer of
    the whole selection.
    """

    object_index: int
    ranges: tuple[tuple[int, int], ...]
    begin: int
    num_bytes: int


class SegmentLayout:
    """Offsets of all pages in the objects of a segment.

    Attributes
    ----------
    order : int64 [num_layers * num_kv_heads * num_pages]
        Flat page numbers in storage order: object by object, by (layer, head, page) within.
    object_regions : list of int
        Region of each object.
    object_sizes : list of int
        Bytes of each object.
    """

    def __init__(self, shape: SegmentShape, regions: Regions) -> None:
        self.shape = shape
        self.regions = regions
        region = regions.of_pages(shape.num_pages).reshape(-1)
        self.page_region = region
        tokens = np.broadcast_to(shape.page_tokens(), shape.pages).reshape(-1)
        self.page_bytes: NDArray[np.int64] = tokens * (2 * shape.row_bytes)
        layer = np.arange(len(region)) // (shape.num_kv_heads * shape.num_pages)
        chunk = self._chunks(region, layer)
        self.order = np.lexsort((np.arange(len(region)), chunk, -region.astype(np.int64)))
        group = (-region.astype(np.int64) * (shape.num_layers + 1) + chunk)[self.order]
        starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1)) if len(group) else group
        self._object_begin = np.append(starts, len(group))  # in pages, by storage order
        ends = np.cumsum(self.page_bytes[self.order])
        total = np.concatenate([[0], ends])
        self._page_offset = total[:-1]  # by storage order, over all objects
        self._object_offset = total[self._object_begin]
        self.object_regions = [int(region[self.order[start]]) for start in starts]
        self.object_sizes = [int(size) for size in np.diff(self._object_offset)]
        self._object_chunks = [int(chunk[self.order[start]]) for start in starts]

    def _chunks(self, region: NDArray[np.uint8], layer: NDArray[np.int64]) -> NDArray[np.int64]:
        """Object number within its region of every page."""
        chunk = np.zeros(len(region), dtype=np.int64)
        for number in range(len(REGIONS)):
            inside = region == number
            per_layer = np.bincount(
                layer[inside],
                weights=self.page_bytes[inside],
                minlength=self.shape.num_layers,
            )
            begin = np.concatenate([[0], np.cumsum(per_layer)[:-1]])
            chunk[inside] = (begin // _OBJECT_BYTES).astype(np.int64)[layer[inside]]
        return chunk

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return int(self._object_offset[-1])

    @property
    def num_objects(self) -> int:
        """Objects of the segment."""
        return len(self.object_sizes)

    @cached_property
    def object_names(self) -> list[str]:
        """Name of each object within the segment: region and number."""
        return [
            f"{REGIONS[region]}-{chunk}"
            for region, chunk in zip(self.object_regions, self._object_chunks, strict=True)
        ]

    def selection(self, wanted: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Places in storage order of the wanted pages [layers, heads, pages]; None: all of them."""
        if wanted is None:
            return np.arange(len(self.order))
        return np.flatnonzero(wanted.reshape(-1)[self.order])

    def runs(self, selection: NDArray[np.int64]) -> list[PageRun]:
        """What to read, object by object, for pages at these places in storage order."""
        runs = []
        begin = 0
        sizes = self.page_bytes[self.order]
        for index in range(self.num_objects):
            low, high = np.searchsorted(selection, self._object_begin[index : index + 2])
            if low == high:
                continue
            places = selection[low:high]
            breaks = np.flatnonzero(np.diff(places) != 1) + 1
            firsts = places[np.concatenate([[0], breaks])]
            lasts = places[np.concatenate([breaks, [len(places)]]) - 1]
            offsets = self._page_offset[firsts] - self._object_offset[index]
            ends = self._page_offset[lasts] + sizes[lasts] - self._object_offset[index]
            ranges = tuple((int(a), int(b - a)) for a, b in zip(offsets, ends, strict=True))
            num_bytes = sum(length for _, length in ranges)
            runs.append(PageRun(index, ranges, begin, num_bytes))
            begin += num_bytes
        return runs

    def page_spans(self, selection: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Of the selected pages, in the order of their buffer: flat number, begin, bytes."""
        pages = self.order[selection]
        sizes = self.page_bytes[pages]
        return pages, np.cumsum(sizes) - sizes, sizes

    def rows(self, selection: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Rows of a selection's buffer, as three arrays of one entry per (page, token).

        Returns
        -------
        k_row, v_row : int64
            Number of the K and the V row in the buffer.
        token : int64
            Index into the segment's [num_layers, num_kv_heads, num_tokens], flat.
        """
        shape = self.shape
        pages, begin, sizes = self.page_spans(selection)
        counts = sizes // (2 * shape.row_bytes)
        head, page = np.divmod(pages, shape.num_pages)
        first_token = head * shape.num_tokens + page * shape.page_size
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        k_row = np.repeat(begin // shape.row_bytes, counts) + inside
        return k_row, k_row + np.repeat(counts, counts), np.repeat(first_token, counts) + inside
