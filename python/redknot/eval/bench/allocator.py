"""The segment allocator of a pool of a million pages: append, admit, release.

Times are those that a caller in Python sees. No memory is moved: pages are numbers here.
"""

from __future__ import annotations

import time

import numpy as np

from redknot import _memory
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row
from redknot.eval.bench.timing import Timing
from redknot.recovery import ModelShape

__all__ = ["run"]

_NUM_PAGES = 1 << 20
_PAGE_SIZE = 64
_DOCUMENTS, _DOCUMENT_TOKENS = 16, 1000
_WINDOW, _SINK, _GLOBAL_EVERY = 1024, 128, 7  # every 7th row is global: 14 %
_QUESTION_TOKENS = 64


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Measure single and batched appends, admission and release."""
    rows = []
    names = ("Llama-3-8B",) if options.quick else ("Llama-3-8B", "Llama-3.3-70B")
    for name, shape in options.shapes(*names).items():
        batches = options.batches or ((1, 8) if options.quick else (1, 8, 32))
        rounds = 20 if options.quick else 100
        for batch in batches:
            options.progress(f"allocator {name} x {batch}")
            rows += _Bench(name, shape, batch).rows(rounds)
    return rows


class _Bench:
    """`batch` sessions over the same documents, in one pool."""

    def __init__(self, name: str, shape: ModelShape, batch: int) -> None:
        self.name, self.batch = name, batch
        self.num_rows = shape.num_layers * shape.num_kv_heads
        self.allocator = _memory.SegmentAllocator(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            num_pages=_NUM_PAGES,
            page_size=_PAGE_SIZE,
            bytes_per_page=2 * _PAGE_SIZE * shape.head_dim * 2,
        )
        size = (shape.num_layers, shape.num_kv_heads)
        is_global = (np.arange(self.num_rows) % _GLOBAL_EVERY == 0).reshape(size)
        self.windows = np.where(is_global, -1, _WINDOW).astype(np.int32)
        self.sinks = np.where(is_global, 0, _SINK).astype(np.int32)
        self.segments = [
            self.allocator.create_segment(_DOCUMENT_TOKENS, 0) for _ in range(_DOCUMENTS)
        ]
        # One element per layer and head; layer 0's rows are asked for below.
        self.num_layers = shape.num_layers

    def _admit(self) -> int:
        session = self.allocator.create_session(self.windows, self.sinks)
        for segment in self.segments:
            self.allocator.append_segment(session, segment)
        self.allocator.append_tokens([session], [_QUESTION_TOKENS], expire_first=False)
        self.allocator.expire(session)
        return session

    def rows(self, rounds: int) -> list[Row]:
        """Rows of this batch size."""
        admit, append, step, release = [], [], [], []
        allocator = self.allocator
        for _ in range(max(3, rounds // 10)):
            started = time.perf_counter()
            sessions = [self._admit() for _ in range(self.batch)]
            admit.append((time.perf_counter() - started) / self.batch)
            ones = [1] * self.batch
            for _ in range(2 * _PAGE_SIZE):  # every slot of a page, and its turn
                started = time.perf_counter()
                allocator.append_tokens(sessions, ones, expire_first=True)
                appended = time.perf_counter()
                for layer in range(self.num_layers):
                    for session in sessions:
                        allocator.tail_slots(session, layer, 1)
                    allocator.rows(sessions, layer)
                append.append(appended - started)
                step.append(time.perf_counter() - started)
            started = time.perf_counter()
            for session in sessions:
                allocator.release_session(session)
            release.append((time.perf_counter() - started) / self.batch)
        context = _DOCUMENTS * _DOCUMENT_TOKENS + _QUESTION_TOKENS
        return [
            self._row("append", append, f"1 token, {self.batch} sessions", self.batch),
            self._row("decode step", step, f"append, slots, tables, {self.batch} sessions",
                      self.batch),
            self._row("admit", admit, f"{context} tokens of {_DOCUMENTS} documents", 1),
            self._row("release", release, f"{context} tokens", 1),
        ]  # fmt: skip

    def _row(self, kind: str, samples: list[float], what: str, sessions: int) -> Row:
        timing = Timing(tuple(samples))
        num_rows = sessions * self.num_rows
        return Row(
            kind=kind,
            heads="mixed",
            shape=f"{self.name} {self.num_rows} rows: {what}",
            time_ms=1e3 * timing.median,
            spread_ms=1e3 * timing.spread,
            details={
                "model": self.name,
                "batch": sessions,
                "rows": num_rows,
                "ns_per_row": 1e9 * timing.median / num_rows,
                "pool_pages": _NUM_PAGES,
                "samples": len(samples),
            },
        )
