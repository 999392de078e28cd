"""Eviction policies on traces of requests, replayed through the very classes that the tiers use.

A trace is a list of requests; a request reads documents, and of each document the regions that it
needs: the global heads' pages and the local heads' sinks and windows always, the middle of local
heads in a stated share of the reads. A document counts as served when everything the request needs
of it was there; otherwise it is computed, and what is missing comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from redknot.store.eviction import POLICIES, EvictionPolicy, make_policy

__all__ = ["TRACES", "Outcome", "Trace", "compare_policies", "replay"]

# Shares of a document's bytes by region: 15 % global heads, windows of about a tenth of the tokens.
REGION_SHARES = {"middle": 0.75, "edges": 0.10, "global": 0.15}
_MIDDLE_READS = 0.3
_BYTES_PER_TOKEN = 1 << 17  # a 32-layer model with 8 KV heads of 128 bfloat16
_SECONDS_PER_TOKEN = 1e-4
_QUADRATIC_TOKENS = 8192  # at this length attention costs as much as everything else


@dataclass(frozen=True)
class Trace:
    """Requests over documents.

    Attributes
    ----------
    tokens : int array [num_documents]
    requests : list of lists of (document, needs_middle)
    """

    name: str
    tokens: np.ndarray
    requests: list[list[tuple[int, bool]]]

    @property
    def total_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.tokens.sum()) * _BYTES_PER_TOKEN


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one trace.

    Attributes
    ----------
    byte_hit_rate : float
        Bytes found of the bytes needed.
    seconds_saved : float
        Seconds of computing that were avoided, of those needed without a store.
    """

    trace: str
    policy: str
    unit: str
    capacity_share: float
    byte_hit_rate: float
    seconds_saved: float


def _lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(6.5, 0.9, count), 64, 8192).astype(np.int64)


def _zipf(rng: np.random.Generator, count: int, alpha: float, size: int) -> np.ndarray:
    weight = 1.0 / np.arange(1, count + 1) ** alpha
    return rng.choice(count, size=size, p=weight / weight.sum())


def _with_needs(
    rng: np.random.Generator, requests: list[list[int]]
) -> list[list[tuple[int, bool]]]:
    return [[(int(d), bool(rng.random() < _MIDDLE_READS)) for d in r] for r in requests]


def zipf_trace(num_requests: int, seed: int = 0) -> Trace:
    """One document a request, popularity by Zipf's law (exponent 0.9, 2,000 documents)."""
    rng = np.random.default_rng(seed)
    picks = _zipf(rng, 2000, 0.9, num_requests)
    return Trace("zipf", _lengths(rng, 2000), _with_needs(rng, [[int(d)] for d in picks]))


def rag_trace(num_requests: int, seed: int = 0) -> Trace:
    """Eight passages a request, of topics that drift; one in ten was never seen and never will be.

    A session of some ten questions stays with one topic of 40 passages; which topics are popular
    changes every thousand requests.
    """
    rng = np.random.default_rng(seed + 1)
    topics, per_topic = 100, 40
    fresh = topics * per_topic
    popular = rng.permutation(topics)
    topic = 0
    requests = []
    for number in range(num_requests):
        if number % 1000 == 0:
            popular = rng.permutation(topics)
        if rng.random() < 0.1:
            topic = int(popular[_zipf(rng, topics, 1.0, 1)[0]])
        picks = set(_zipf(rng, per_topic, 0.7, 8).tolist())
        request = [topic * per_topic + pick for pick in sorted(picks)]
        if rng.random() < 0.8:
            request.append(fresh)
            fresh += 1
        requests.append(request)
    return Trace("rag", _lengths(rng, fresh), _with_needs(rng, requests))


def scan_trace(num_requests: int, seed: int = 0) -> Trace:
    """Zipf's law, and now and then a job that reads 400 cold documents one after the other."""
    rng = np.random.default_rng(seed + 2)
    picks = _zipf(rng, 1000, 0.9, num_requests).tolist()
    cold = 1000
    requests: list[list[int]] = []
    for number, pick in enumerate(picks):
        requests.append([pick])
        if number % 1000 == 999:
            requests += [[cold + i] for i in range(400)]
            cold += 400
    return Trace("scan", _lengths(rng, cold), _with_needs(rng, requests))


TRACES: dict[str, Callable[[int, int], Trace]] = {
    "zipf": zipf_trace,
    "rag": rag_trace,
    "scan": scan_trace,
}


class _Cache:
    """Bytes of units under one policy: what `Tier` does, without the bytes."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self._policy, self._capacity, self._used = policy, capacity, 0
        self._sizes: dict[str, int] = {}

    def holds(self, unit: str) -> bool:
        return unit in self._sizes

    def touch(self, unit: str) -> None:
        self._policy.touch(unit)

    def offer(self, unit: str, num_bytes: int, cost: float) -> None:
        room = self._capacity - self._used
        if num_bytes > self._capacity or not self._policy.admit(unit, num_bytes, cost, room):
            return
        while self._used + num_bytes > self._capacity:
            victim = self._policy.victim()
            if victim is None:
                return
            self._policy.remove(victim)
            self._used -= self._sizes.pop(victim)
        self._policy.insert(unit, num_bytes, cost)
        self._sizes[unit] = num_bytes
        self._used += num_bytes


def replay(trace: Trace, policy: str, capacity_share: float, unit: str = "region") -> Outcome:
    """Replay a trace through one policy.

    Parameters
    ----------
    policy : str
        A name in `redknot.store.eviction.POLICIES`.
    capacity_share : float
        Bytes of the tier, as a share of all documents' bytes.
    unit : {"region", "segment"}
        What is kept or dropped as a whole.
    """
    capacity = int(trace.total_bytes * capacity_share)
    cache = _Cache(make_policy(policy, capacity), capacity)
    needed = hit = 0
    seconds = saved = 0.0
    for request in trace.requests:
        for document, needs_middle in request:
            size = int(trace.tokens[document]) * _BYTES_PER_TOKEN
            cost = _recompute_seconds(int(trace.tokens[document]))
            served = True
            absent = []
            for name, share, wanted in _units(unit, needs_middle):
                key, num_bytes = f"{document}/{name}", int(size * share)
                here = cache.holds(key)
                if wanted:
                    cache.touch(key)
                    needed += num_bytes
                    hit += num_bytes * here
                    served &= here
                if not here:
                    absent.append((key, num_bytes, cost * share))
            seconds += cost
            saved += cost * served
            if not served:  # computing it makes all of it
                for missing in absent:
                    cache.offer(*missing)
    return Outcome(
        trace.name, policy, unit, capacity_share, hit / max(needed, 1), saved / max(seconds, 1e-9)
    )


def _recompute_seconds(tokens: int) -> float:
    return tokens * (1 + tokens / _QUADRATIC_TOKENS) * _SECONDS_PER_TOKEN


def _units(unit: str, needs_middle: bool) -> Iterator[tuple[str, float, bool]]:
    if unit == "segment":
        yield "all", 1.0, True
        return
    for name, share in REGION_SHARES.items():
        yield name, share, needs_middle or name != "middle"


def compare_policies(
    num_requests: int,
    *,
    seed: int = 0,
    capacity_shares: tuple[float, ...] = (0.02, 0.1),
    progress: Callable[[int], object] = lambda count: None,
) -> list[dict[str, object]]:
    """Every policy on every trace, by region and by whole segment."""
    rows = []
    for make in TRACES.values():
        trace = make(num_requests, seed)
        for share in capacity_shares:
            for unit in ("segment", "region"):
                for policy in POLICIES:
                    rows.append(asdict(replay(trace, policy, share, unit)))
                    progress(1)
    return rows
