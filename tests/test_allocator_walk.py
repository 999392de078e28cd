"""Random walks of the allocator against the naive model, with real pages and NaN in freed ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import memory_model as model
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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


class AllocatorWalk(RuleBasedStateMachine):
    """Every live session and segment reads back what the model holds, after every step."""

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
        self.create_session(data.draw(WINDOWS), data.draw(SINKS))

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

    # --- steps ------------------------------------------------------------------------------------
    # Sessions and segments are always there, so that most steps do something to them.
    def pick(self, data: st.DataObject, what: dict[int, Any]) -> int:
        return data.draw(st.sampled_from(sorted(what)))

    @precondition(lambda self: len(self.segments) < 3)
    @rule(
        data=st.data(), num_tokens=st.integers(1, 13), first_position=st.sampled_from([0, 0, 2, 9])
    )
    def create_segment(self, data: st.DataObject, num_tokens: int, first_position: int) -> None:
        present = data.draw(st.none() | self.page_masks(num_tokens))
        most = len(HEADS) * -(-num_tokens // self.page_size)
        with self.all_or_nothing(most + (present is not None)):
            segment = self.allocator.create_segment(num_tokens, first_position, present)
            self.clean_hole()
            self.segments[segment] = model.Segment(
                first_position, {head: [0] * num_tokens for head in HEADS}
            )
            self.absent[segment] = set()
            missing = np.ones((NUM_LAYERS, NUM_HEADS, most // len(HEADS)), dtype=bool)
            if present is not None:
                missing = np.array(present)
                self.absent[segment] = pages_of(~missing)
            self.fill(segment, pages_of(missing))

    def page_masks(self, num_tokens: int) -> st.SearchStrategy[list[list[list[bool]]]]:
        pages = -(-num_tokens // self.page_size)
        row = st.lists(st.booleans(), min_size=pages, max_size=pages)
        heads = st.lists(row, min_size=NUM_HEADS, max_size=NUM_HEADS)
        return st.lists(heads, min_size=NUM_LAYERS, max_size=NUM_LAYERS)

    def clean_hole(self) -> None:
        if self.allocator.hole_page >= 0:
            self.pages[self.allocator.hole_page, :2] = 0

    def fill(self, segment: int, pages: set[tuple[model.Head, int]]) -> None:
        """Write new contents to pages of a segment."""
        for (layer, head), page in pages:
            contents = self.segments[segment].contents[layer, head]
            inside = slice(page * self.page_size, (page + 1) * self.page_size)
            slots = self.allocator.segment_slots(segment, layer)[inside, head]
            contents[inside] = itertools.islice(self.new_content, len(slots))
            self.write(slots, np.array(contents[inside]))

    @precondition(lambda self: self.segments)
    @rule(data=st.data())
    def drop_segment_pages(self, data: st.DataObject) -> None:
        segment = self.pick(data, self.segments)
        contents = self.segments[segment].contents
        mask = data.draw(self.page_masks(len(contents[0, 0])))
        free, there = self.allocator.free_pages(), pages_of(np.array(mask)) - self.absent[segment]
        freed = self.allocator.drop_segment_pages(segment, mask)
        self.clean_hole()
        assert self.allocator.free_pages() == free + freed
        slots = [self.allocator.segment_slots(segment, layer) for layer in range(NUM_LAYERS)]
        if free == freed == 0 and not self.absent[segment] and np.min(slots) >= 0:
            there = set()  # there was no page for the hole, and none became free
        for head, page in there:
            inside = slice(page * self.page_size, (page + 1) * self.page_size)
            contents[head][inside] = [0] * len(contents[head][inside])
        self.absent[segment] |= there

    @precondition(lambda self: self.segments)
    @rule(data=st.data())
    def restore_segment_pages(self, data: st.DataObject) -> None:
        segment = self.pick(data, self.segments)
        mask = data.draw(self.page_masks(len(self.segments[segment].contents[0, 0])))
        missing = pages_of(np.array(mask)) & self.absent[segment]
        with self.all_or_nothing(len(missing)):
            self.allocator.restore_segment_pages(segment, mask)
            self.absent[segment] -= missing
            self.fill(segment, missing)

    @precondition(lambda self: len(self.segments) > 1)
    @rule(data=st.data())
    def release_segment(self, data: st.DataObject) -> None:
        segment = self.pick(data, self.segments)
        self.allocator.release_segment(segment)
        del self.segments[segment], self.absent[segment]

    @precondition(lambda self: len(self.sessions) < 3)
    @rule(windows=WINDOWS, sinks=SINKS)
    def create_session(self, windows: list[list[int]], sinks: list[list[int]]) -> None:
        session = self.allocator.create_session(windows, sinks)
        self.sessions[session] = model.Session(windows, sinks)

    @precondition(lambda self: len(self.sessions) < 3)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        session = self.pick(data, self.sessions)
        self.sessions[self.allocator.fork_session(session)] = self.sessions[session].fork()

    @precondition(lambda self: len(self.sessions) > 2)
    @rule(data=st.data())
    def release_session(self, data: st.DataObject) -> None:
        session = self.pick(data, self.sessions)
        self.allocator.release_session(session)
        del self.sessions[session]

    @precondition(lambda self: self.segments)
    @rule(data=st.data())
    def append_segment(self, data: st.DataObject) -> None:
        session, segment = self.pick(data, self.sessions), self.pick(data, self.segments)
        free = self.allocator.free_pages()
        self.allocator.append_segment(session, segment)
        self.sessions[session].append_segment(self.segments[segment])
        assert self.allocator.free_pages() == free

    @rule(data=st.data(), num_tokens=st.lists(st.integers(0, 12), min_size=3, max_size=3))
    def prefill(self, data: st.DataObject, num_tokens: list[int]) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(sorted(self.sessions)), min_size=1, unique=True)
        )
        self.append(dict(zip(chosen, num_tokens, strict=False)), expire_first=False)

    @rule(num_steps=st.integers(1, 9))
    def decode(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.append(dict.fromkeys(self.sessions, 1), expire_first=True)

    def append(self, num_tokens: dict[int, int], expire_first: bool) -> None:
        most = sum(len(HEADS) * (1 + -(-n // self.page_size)) for n in num_tokens.values())
        with self.all_or_nothing(most):
            self.execute(
                self.allocator.append_tokens(
                    list(num_tokens), list(num_tokens.values()), expire_first
                )
            )
            for session, n in num_tokens.items():
                expected = self.sessions[session]
                if expire_first:
                    expected.expire()
                expected.append(n, self.new_content)
                positions = range(expected.length - n, expected.length)
                for layer in range(NUM_LAYERS):
                    slots = self.allocator.tail_slots(session, layer, n)
                    assert slots.shape == (n, NUM_HEADS) and (slots >= 0).all()
                    self.write_positions(session, layer, slots, positions)

    def write_positions(
        self, session: int, layer: int, slots: np.ndarray, positions: range | list[int]
    ) -> None:
        for head in range(NUM_HEADS):
            tokens = self.sessions[session].rows[layer, head].tokens
            contents = np.array([tokens[p].content for p in positions], dtype=float)
            there = slots[:, head] >= 0
            self.write(slots[there, head], contents[there])

    @precondition(lambda self: any(s.length for s in self.sessions.values()))
    @rule(data=st.data(), two_requests=st.booleans())
    def refresh(self, data: st.DataObject, two_requests: bool) -> None:
        session = self.pick(data, {k: s for k, s in self.sessions.items() if s.length})
        expected = self.sessions[session]
        which = [data.draw(st.integers(-1, int(two_requests))) for _ in HEADS]
        requests = []
        for i in range(1 + two_requests):
            # Runs, so that whole pages are among the requested ones.
            begin = data.draw(st.integers(0, expected.length - 1))
            end = data.draw(st.integers(begin + 1, min(expected.length, begin + 12)))
            step = data.draw(st.sampled_from([1, 1, 3]))
            requests.append(
                (
                    [h for h, w in zip(HEADS, which, strict=True) if w == i],
                    [*range(begin, end, step)],
                )
            )
        held = {head: self.held(session, head) for head in HEADS}
        masks = [
            [[(layer, head) in heads for head in range(NUM_HEADS)] for layer in range(NUM_LAYERS)]
            for heads, _ in requests
        ]
        most = sum(len(heads) * len(positions) for heads, positions in requests)
        with self.all_or_nothing(most):
            given = [(m, positions) for m, (_, positions) in zip(masks, requests, strict=True)]
            keep = data.draw(st.booleans())
            self.execute(self.allocator.make_writable(session, given, keep_contents=keep))
            for heads, positions in requests:
                expected.refresh(heads, positions, self.new_content)
                for layer in range(NUM_LAYERS):
                    slots = self.allocator.position_slots(session, layer, positions)
                    for head in range(NUM_HEADS):
                        there = [p in held[layer, head] for p in positions]
                        assert (slots[:, head] >= 0).tolist() == there
                    # The rows that were not asked for keep their shared pages.
                    slots[:, [head for head in range(NUM_HEADS) if (layer, head) not in heads]] = -1
                    self.write_positions(session, layer, slots, positions)

    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        session = self.pick(data, self.sessions)
        expected = self.sessions[session]
        free = self.allocator.free_pages()
        assert self.allocator.expire(session) == self.allocator.free_pages() - free
        expected.expire()
        for head, row in expected.rows.items():
            for _, first, count, _ in self.row(session, head):  # what is left is of use
                assert any(row.sees(p, expected.length) for p in range(first, first + count))

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = self.pick(data, self.sessions)
        expected = self.sessions[session]
        length = max(0, expected.length - data.draw(st.integers(0, 15)))
        possible = all(
            row.needed(length) <= self.held(session, head) for head, row in expected.rows.items()
        )
        before = self.state()
        assert self.allocator.truncate(session, length) == possible
        if possible:
            expected.truncate(length)
        else:
            assert self.state() == before

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


TestAllocatorWalk = AllocatorWalk.TestCase
TestAllocatorWalk.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
