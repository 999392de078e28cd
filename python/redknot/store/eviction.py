"""Which units a full tier keeps: recency, frequency, and what it would cost to compute them again.

A *unit* is what a tier keeps or drops as a whole: one region of one segment. The tiers and the
simulator (`redknot store simulate`) use the very same classes.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from redknot.errors import InputError

__all__ = ["POLICIES", "CostAware", "EvictionPolicy", "Lru", "S3Fifo", "TinyLfu", "make_policy"]


class EvictionPolicy(Protocol):
    """Order of the units of one tier. Not thread-safe: the tier holds its lock."""

    def touch(self, unit: str) -> None:
        """A unit, kept or not, was asked for."""
        ...

    def admit(self, unit: str, num_bytes: int, cost: float, room: int) -> bool:
        """Whether to take a unit in when `room` bytes are free and others would have to go."""
        ...

    def insert(self, unit: str, num_bytes: int, cost: float) -> None:
        """A unit was taken in; `cost` is what computing it again would take, in seconds."""
        ...

    def victim(self) -> str | None:
        """The unit to drop next, or None if there is none; it stays until `remove`."""
        ...

    def remove(self, unit: str) -> None:
        """A unit is gone."""
        ...


class Lru:
    """The least recently used unit goes first."""

    def __init__(self, capacity: int) -> None:
        self._units: OrderedDict[str, None] = OrderedDict()

    def touch(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        if unit in self._units:
            self._units.move_to_end(unit)

    def admit(self, unit: str, num_bytes: int, cost: float, room: int) -> bool:
        """See `EvictionPolicy`."""
        return True

    def insert(self, unit: str, num_bytes: int, cost: float) -> None:
        """See `EvictionPolicy`."""
        self._units[unit] = None
        self._units.move_to_end(unit)

    def victim(self) -> str | None:
        """See `EvictionPolicy`."""
        return next(iter(self._units), None)

    def remove(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        self._units.pop(unit, None)


class S3Fifo:
    """A small queue on trial before a main queue (S3-FIFO, Yang et al., SOSP 2023).

    New units wait in a queue of a tenth of the bytes; those asked for again move on to the main
    queue, where a unit is spared once for each time it was asked for. Units that fell out on trial
    are remembered by name and go straight to the main queue when they come back.
    """

    _TRIAL_SHARE = 0.1
    _MOST_USES = 3

    def __init__(self, capacity: int) -> None:
        self._trial_bytes_limit = capacity * self._TRIAL_SHARE
        self._trial: OrderedDict[str, None] = OrderedDict()
        self._main: OrderedDict[str, None] = OrderedDict()
        self._uses: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._trial_bytes = 0
        self._ghosts: OrderedDict[str, None] = OrderedDict()

    def touch(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        if unit in self._uses:
            self._uses[unit] = min(self._uses[unit] + 1, self._MOST_USES)

    def admit(self, unit: str, num_bytes: int, cost: float, room: int) -> bool:
        """See `EvictionPolicy`."""
        return True

    def insert(self, unit: str, num_bytes: int, cost: float) -> None:
        """See `EvictionPolicy`."""
        self.remove(unit)
        self._uses[unit], self._bytes[unit] = 0, num_bytes
        if unit in self._ghosts:
            del self._ghosts[unit]
            self._main[unit] = None
        else:
            self._trial[unit] = None
            self._trial_bytes += num_bytes

    def victim(self) -> str | None:
        """See `EvictionPolicy`."""
        while self._trial and (self._trial_bytes > self._trial_bytes_limit or not self._main):
            unit = next(iter(self._trial))
            if not self._uses[unit]:
                return unit
            self._leave_trial(unit)
            self._uses[unit] = 0
            self._main[unit] = None
        while self._main:
            unit = next(iter(self._main))
            if not self._uses[unit]:
                return unit
            self._uses[unit] -= 1
            self._main.move_to_end(unit)
        return next(iter(self._trial), None)

    def _leave_trial(self, unit: str) -> None:
        del self._trial[unit]
        self._trial_bytes -= self._bytes[unit]

    def remove(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        if unit in self._trial:
            self._leave_trial(unit)
            self._ghosts[unit] = None
            while len(self._ghosts) > max(len(self._main), 64):
                self._ghosts.popitem(last=False)
        self._main.pop(unit, None)
        self._uses.pop(unit, None)
        self._bytes.pop(unit, None)


class TinyLfu:
    """LRU behind a door: a unit comes in only if it is asked for more often than who must go.

    How often is counted exactly for the last accesses (ten for each unit kept, at least 1,000)
    instead of approximately in a sketch: a tier holds thousands of units, not billions (TinyLFU,
    Einziger et al., ACM TOS 2017).
    """

    _WINDOW = 10
    _LEAST_WINDOW = 1000

    def __init__(self, capacity: int) -> None:
        self._lru = Lru(capacity)
        self._kept: set[str] = set()
        self._recent: deque[str] = deque()
        self._uses: dict[str, int] = {}

    def touch(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        self._lru.touch(unit)
        self._recent.append(unit)
        self._uses[unit] = self._uses.get(unit, 0) + 1
        while len(self._recent) > max(self._WINDOW * len(self._kept), self._LEAST_WINDOW):
            old = self._recent.popleft()
            self._uses[old] -= 1
            if not self._uses[old]:
                del self._uses[old]

    def admit(self, unit: str, num_bytes: int, cost: float, room: int) -> bool:
        """See `EvictionPolicy`."""
        victim = self._lru.victim()
        if room >= num_bytes or victim is None:
            return True
        return self._uses.get(unit, 0) > self._uses.get(victim, 0)

    def insert(self, unit: str, num_bytes: int, cost: float) -> None:
        """See `EvictionPolicy`."""
        self._kept.add(unit)
        self._lru.insert(unit, num_bytes, cost)

    def victim(self) -> str | None:
        """See `EvictionPolicy`."""
        return self._lru.victim()

    def remove(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        self._kept.discard(unit)
        self._lru.remove(unit)


@dataclass
class _Worth:
    num_bytes: int
    cost: float
    uses: int
    priority: float


class CostAware:
    """What is cheap to compute again, large and seldom used goes first (GreedyDual-Size-Frequency).

    A unit's priority is uses * recompute seconds / bytes, above the priority of what was dropped
    last, so that what is not used any more grows old (Cherkasova, HPL-98-69).
    """

    def __init__(self, capacity: int) -> None:
        self._units: dict[str, _Worth] = {}
        self._heap: list[tuple[float, int, str]] = []  # stale entries are skipped when met
        self._age = 0.0
        self._count = 0

    def _push(self, unit: str, worth: _Worth) -> None:
        worth.priority = self._age + worth.uses * worth.cost / max(worth.num_bytes, 1)
        self._count += 1
        heapq.heappush(self._heap, (worth.priority, self._count, unit))

    def touch(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        worth = self._units.get(unit)
        if worth is not None:
            worth.uses += 1
            self._push(unit, worth)

    def admit(self, unit: str, num_bytes: int, cost: float, room: int) -> bool:
        """See `EvictionPolicy`."""
        return True

    def insert(self, unit: str, num_bytes: int, cost: float) -> None:
        """See `EvictionPolicy`."""
        self._units[unit] = worth = _Worth(num_bytes, cost, 1, 0.0)
        self._push(unit, worth)

    def victim(self) -> str | None:
        """See `EvictionPolicy`."""
        while self._heap:
            priority, _, unit = self._heap[0]
            worth = self._units.get(unit)
            if worth is not None and worth.priority == priority:
                self._age = priority
                return unit
            heapq.heappop(self._heap)
        return None

    def remove(self, unit: str) -> None:
        """See `EvictionPolicy`."""
        self._units.pop(unit, None)


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": Lru,
    "s3fifo": S3Fifo,
    "tinylfu": TinyLfu,
    "cost": CostAware,
}


def make_policy(name: str, capacity: int) -> EvictionPolicy:
    """Policy of a tier that holds `capacity` bytes.

    Raises
    ------
    InputError
        For a name that is not in `POLICIES`.
    """
    if name not in POLICIES:
        raise InputError(f"unknown eviction policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name](capacity)
