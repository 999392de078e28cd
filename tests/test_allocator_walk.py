"""Random walks of the allocator against the naive model, with real pages and NaN in freed ones."""

from __future__ import annotations

import itertools
from typing import Any

import memory_model as model
import numpy as np
from checked_allocator import (
    HEADS,
    NUM_HEADS,
    NUM_LAYERS,
    SINKS,
    WINDOWS,
    CheckedAllocator,
    pages_of,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule


class AllocatorWalk(CheckedAllocator):
    """Every live session and segment reads back what the model holds, after every step."""

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
        self.add_session(windows, sinks)

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


TestAllocatorWalk = AllocatorWalk.TestCase
TestAllocatorWalk.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
