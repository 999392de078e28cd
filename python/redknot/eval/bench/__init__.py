"""Benchmarks: named shapes, roofs measured at start, peers in the same run.

A benchmark is a module with a docstring, whose first line says what it measures, and
`run(options, roofs) -> list[Row]`. To add one, write the module and name it in `BENCHES`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from redknot.errors import InputError

__all__ = ["BENCHES", "bench_module"]

BENCHES: dict[str, str] = {
    "attention": "redknot.eval.bench.attention",
    "ffn": "redknot.eval.bench.ffn",
    "rope": "redknot.eval.bench.rope",
    "allocator": "redknot.eval.bench.allocator",
    "ttft": "redknot.eval.bench.ttft",
    "capacity": "redknot.eval.bench.capacity",
    "decode": "redknot.eval.bench.decode_step",
    "store": "redknot.eval.bench.store",
}


def bench_module(name: str) -> ModuleType:
    """The module of a benchmark."""
    if name not in BENCHES:
        raise InputError(f"unknown benchmark {name!r}; known: {', '.join(BENCHES)}")
    return import_module(BENCHES[name])
