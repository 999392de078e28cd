"""What must hold of an allocator after every step: all reads back, every page is accounted for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import memory_model as model
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from redknot._memory import OutOfPages, SegmentAllocator

NUM_LAYERS, NUM_HEADS = 2, 2
HEADS = list(itertools.product(range(NUM_LAYERS), range(NUM_HEADS)))


def per_head(values: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(values, min_size=NUM_HEADS, max_size=NUM_HEADS)
    return st.lists(row, min_size=NUM_LAYERS, max_size=NUM_LAYERS)


WINDOWS = per_head(st.sampled_from([-1, 1, 2, 3, 6, 11]))
SINKS = per_head(st.integers(0, 6))


def pages_of(mask: np.ndarray) -> set[tuple[model.Head, int]]:
    """(head, page) of every page of a mask."""
    return {((int(x), int(y)), int(page)) for x, y, page in np.argwhere(mask)}


class CheckedAllocator(RuleBasedStateMachine):
    """An allocator with real pages beside the naive model of `memory_model`.

    `sessions` and `segments` hold the model's by the allocator's ids. Freed pages hold NaN.
    """

    @initialize(
        data=st.data(), num_pages=st.sampled_from([48, 120, 400]), page_size=st.integers(1, 5)
    )
    def start(self, data: st.DataObject, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        # K and V of a page side by side: two regions with a stride of their own, and a gap.
        self.pages = np.full((num_pages, 3, page_size), np.nan)
        page_bytes = page_size * self.pages.itemsize
        base = self.pages.ctypes.data
        self.allocator = SegmentAllocator(
            NUM_LAYERS,
            NUM_HEADS,
            num_pages,
            page_size,
            2 * page_bytes,
            storage=[(base + i * page_bytes, 3 * page_bytes, page_bytes) for i in (0, 1)],
            poison=True,
        )
        self.sessions: dict[int, model.Session] = {}
        self.segments: dict[int, model.Segment] = {}
        self.absent: dict[int, set[tuple[model.Head, int]]] = {}  # pages that a segment has not
        self.new_content = itertools.count(1)
        self.add_session(data.draw(WINDOWS), data.draw(SINKS))

    def add_session(self, windows: list[list[int]], sinks: list[list[int]]) -> None:
        session = self.allocator.create_session(windows, sinks)
        self.sessions[session] = model.Session(windows, sinks)

    # --- pages ------------------------------------------------------------------------------------
    def write(self, slots: np.ndarray, contents: np.ndarray) -> None:
        page, index = slots // self.page_size, slots % self.page_size
        self.pages[page, 0, index] = contents
        self.pages[page, 1, index] = -contents

    def read(self, slots: np.ndarray) -> np.ndarray:
        page, index = slots // self.page_size, slots % self.page_size
        np.testing.assert_array_equal(self.pages[page, 0, index], -self.pages[page, 1, index])
        return self.pages[page, 0, index]

    def execute(self, copies: np.ndarray) -> None:
        self.pages[copies[:, 1]] = self.pages[copies[:, 0]]

    # --- what must hold ---------------------------------------------------------------------------
    def row(self, session: int, head: model.Head) -> np.ndarray:
        row_indptr, page_refs = self.allocator.rows([session], head[0])
        return page_refs[row_indptr[head[1]] : row_indptr[head[1] + 1]]

    def held(self, session: int, head: model.Head) -> set[int]:
        refs = self.row(session, head)
        return {int(p) for _, first, count, _ in refs for p in range(first, first + count)}

    def state(self) -> tuple[Any, ...]:
        ids = list(self.sessions)
        tables = [self.allocator.rows(ids, layer) for layer in range(NUM_LAYERS)]
        lengths = [self.allocator.session_length(s) for s in ids]
        return ([[a.tolist() for a in t] for t in tables], lengths, self.allocator.stats())

    @contextmanager
    def all_or_nothing(self, most_pages: int) -> Iterator[None]:
        """Lets a call run out of pages, if that is true and changes nothing."""
        before, pages = self.state(), self.pages.copy()
        free = self.allocator.free_pages()
        try:
            yield
        except OutOfPages as error:
            assert error.pages_free == free < error.pages_needed <= most_pages
            assert self.state() == before
            np.testing.assert_array_equal(self.pages, pages)

    @invariant()
    def rows_read_back(self) -> None:
        for session, expected in self.sessions.items():
            assert self.allocator.session_length(session) == expected.length
            for head, row in expected.rows.items():
                seen: list[int] = []
                for page, first, count, offset in self.row(session, head):
                    assert 1 <= count <= self.page_size
                    tokens = [row.tokens[first + i] for i in range(count)]
                    slots = page * self.page_size + np.arange(count)
                    assert self.read(slots).tolist() == [t.content for t in tokens]
                    assert [first + i - offset for i in range(count)] == [
                        t.rotated_at for t in tokens
                    ]
                    seen.extend(range(first, first + count))
                assert seen == sorted(set(seen))
                assert set(row.tokens) - set(seen) <= row.forgotten

    @invariant()
    def segments_read_back(self) -> None:
        for segment, expected in self.segments.items():
            for layer in range(NUM_LAYERS):
                slots = self.allocator.segment_slots(segment, layer)
                for head in range(NUM_HEADS):
                    contents = np.array(expected.contents[layer, head])
                    there = slots[:, head] >= 0
                    pages = np.flatnonzero(~there) // self.page_size
                    assert {((layer, head), p) for p in pages.tolist()} == {
                        key for key in self.absent[segment] if key[0] == (layer, head)
                    }
                    assert (self.read(slots[there, head]) == contents[there]).all()
                    assert (contents[~there] == 0).all()

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        owners: dict[int, set[tuple[str, int]]] = {}
        global_pages: set[int] = set()
        head_of: dict[int, model.Head] = {}

        def own(page: int, head: model.Head, owner: tuple[str, int]) -> None:
            assert head_of.setdefault(page, head) == head  # a page serves one head
            owners.setdefault(page, set()).add(owner)

        hole = self.allocator.hole_page
        if hole >= 0:  # a segment's page, for all heads
            owners[hole] = {("segment", -1)}
        for segment in self.segments:
            for layer, head in HEADS:
                slots = self.allocator.segment_slots(segment, layer)[:, head]
                for page in set((slots[slots >= 0] // self.page_size).tolist()):
                    own(page, (layer, head), ("segment", segment))
        for session, expected in self.sessions.items():
            for head, row in expected.rows.items():
                for page in self.row(session, head)[:, 0].tolist():
                    if page == hole:
                        owners[hole].add(("session", session))
                        continue
                    own(page, head, ("session", session))
                    if row.window < 0:
                        global_pages.add(page)

        in_segments = {p for p, who in owners.items() if any(kind == "segment" for kind, _ in who)}
        num_pages = len(self.pages)
        assert self.allocator.stats() == {
            "num_pages": num_pages,
            "num_free_pages": num_pages - len(owners),
            "segment_pages": len(in_segments),
            "session_global_pages": len(global_pages - in_segments),
            "session_local_pages": len(owners.keys() - in_segments - global_pages),
            "shared_pages": sum(len(who) > 1 for who in owners.values()),
            "swapped_pages": 0,
            "num_segments": len(self.segments),
            "num_sessions": len(self.sessions),
            "bytes_per_page": 2 * self.page_size * self.pages.itemsize,
        }
        assert self.allocator.free_pages() == num_pages - len(owners)
        for session in self.sessions:
            mine = [w for p, w in owners.items() if ("session", session) in w and p != hole]
            assert self.allocator.session_pages(session) == len(mine)
            assert self.allocator.session_private_pages(session) == sum(len(w) == 1 for w in mine)
        free = [p for p in range(num_pages) if p not in owners]
        assert np.isnan(self.pages[free, :2]).all()

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for session in self.sessions:
            self.allocator.release_session(session)
        for segment in self.segments:
            self.allocator.release_segment(segment)
        hole = self.allocator.hole_page
        assert self.allocator.free_pages() == len(self.pages) - (hole >= 0)
        free = [page for page in range(len(self.pages)) if page != hole]
        assert np.isnan(self.pages[free, :2]).all()
