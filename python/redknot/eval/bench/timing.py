"""Time of several ways to do the same, taken in turns: medians, spreads and ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch

from redknot.eval.statistics import median_and_spread

__all__ = ["Timing", "measure", "ratio", "rotating", "seconds_per_call"]

_Input = TypeVar("_Input")

# A ratio whose quartiles are further from its median than this says nothing.
_MAX_RELATIVE_SPREAD = 0.2
_MIN_ROUNDS, _MAX_ROUNDS = 3, 25
_MIN_SAMPLE_SECONDS = 2e-4  # shorter calls are repeated within one sample
# A GPU waits so long (some 100 us) for each call of a sample, until all are queued: what is timed
# is then the device alone, however slow Python is. Fewer calls, so that the queue takes them all.
_QUEUE_CYCLES_PER_CALL = 200_000
_MAX_CUDA_CALLS = 20


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


def seconds_per_call(work: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Mean time of `calls` calls; on CUDA between events, with all calls queued beforehand."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_QUEUE_CYCLES_PER_CALL * calls)
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / calls
    started = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - started) / calls


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
    first = {name: seconds_per_call(work, 1, device) for name, work in ways.items()}
    if max(first.values()) < 1.0:  # the very first call also builds what is built lazily
        first = {name: seconds_per_call(work, 1, device) for name, work in ways.items()}
    calls = {name: max(1, round(_MIN_SAMPLE_SECONDS / first[name])) for name in ways}
    if device == "cuda":
        calls = {name: min(count, _MAX_CUDA_CALLS) for name, count in calls.items()}
    round_seconds = sum(first[name] * calls[name] for name in ways)
    rounds = min(max(int(seconds / round_seconds), min_rounds), _MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            samples[name].append(seconds_per_call(work, calls[name], device))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def ratio(own: Timing, peer: Timing) -> float | None:
    """How many times faster `own` was than `peer`; None where the rounds disagree too much.

    Both must come from one `measure`: each round gives a ratio, and their median is returned.
    """
    each = [theirs / ours for ours, theirs in zip(own.samples, peer.samples, strict=True)]
    middle, spread = median_and_spread(each)
    return middle if len(each) >= _MIN_ROUNDS and spread <= _MAX_RELATIVE_SPREAD * middle else None
