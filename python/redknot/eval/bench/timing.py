"""Time of several ways to do the same, taken in turns: medians, spreads and ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch

from redknot.eval.statistics import median_and_spread

__all__ = ["Timing", "measure", "ratio", "rotating"]

_Input = TypeVar("_Input")

# A ratio whose quartiles are further from its median than this says nothing.
_MAX_RELATIVE_SPREAD = 0.2
_MIN_ROUNDS, _MAX_ROUNDS = 3, 25
_MIN_SAMPLE_SECONDS = 2e-4  # shorter calls are repeated within one sample


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample for each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return median_and_spread(self.samples)[0]

    @property
    def spread(self) -> float:
        """Half of the interquartile range, in seconds."""
        return median_and_spread(self.samples)[1]


def rotating(work: Callable[[_Input], object], inputs: Sequence[_Input]) -> Callable[[], object]:
    """A call that takes the next of `inputs` each time, so that none is still in the cache."""
    turn = cycle(inputs)
    return lambda: work(next(turn))


def measure(
    ways: dict[str, Callable[[], object]],
    *,
    seconds: float,
    device: str = "cpu",
    min_rounds: int = _MIN_ROUNDS,
) -> dict[str, Timing]:
    """Time every way in turns, so that a busy machine disturbs all alike.

    Each is called once to warm up. Rounds go on for about `seconds` in all, at least `min_rounds`.
    """

    def sample(work: Callable[[], object], calls: int) -> float:
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        _synchronize(device)
        return (time.perf_counter() - started) / calls

    first = {name: sample(work, 1) for name, work in ways.items()}
    if max(first.values()) < 1.0:  # the very first call also builds what is built lazily
        first = {name: sample(work, 1) for name, work in ways.items()}
    calls = {name: max(1, round(_MIN_SAMPLE_SECONDS / first[name])) for name in ways}
    round_seconds = sum(first[name] * calls[name] for name in ways)
    rounds = min(max(int(seconds / round_seconds), min_rounds), _MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            samples[name].append(sample(work, calls[name]))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def ratio(own: Timing, peer: Timing) -> float | None:
    """How many times faster `own` was than `peer`; None where the rounds disagree too much.

    Both must come from one `measure`: each round gives a ratio, and their median is returned.
    """
    each = [theirs / ours for ours, theirs in zip(own.samples, peer.samples, strict=True)]
    middle, spread = median_and_spread(each)
    return middle if len(each) >= _MIN_ROUNDS and spread <= _MAX_RELATIVE_SPREAD * middle else None


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
