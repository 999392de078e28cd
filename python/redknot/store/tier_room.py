"""What a tier holds within its capacity: units that come and go as a whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from redknot.store.eviction import make_policy
from redknot.store.layout import REGIONS
from redknot.store.manifest import Manifest

__all__ = ["TierRoom"]

# Every so often a tier with a capacity looks at what other processes have written.
_RELIST_SECONDS = 10.0


@dataclass
class _Unit:
    """One region of one segment: what a tier keeps or drops as a whole."""

    object_keys: list[str]
    num_bytes: int


class TierRoom:
    """The units in a tier, their bytes, and the policy that says which of them go.

    Parameters
    ----------
    policy : str
        Name of the eviction policy.
    capacity : int or None
        Bytes that the units may take; None: no limit.
    list_objects : callable
        Bytes of every object in the storage engine by its key; None when it does not answer.
    drop_items : callable
        Takes items out of the storage engine, given their keys and the unit's bytes.
    """

    def __init__(
        self,
        policy: str,
        capacity: int | None,
        *,
        list_objects: Callable[[], Mapping[str, int] | None],
        drop_items: Callable[[Sequence[str], int], None],
    ) -> None:
        self._capacity = capacity
        self._list_objects, self._drop_items = list_objects, drop_items
        self._lock = threading.RLock()
        self._policy = make_policy(policy, capacity or 1 << 62)
        self._units: dict[str, _Unit] = {}
        self._used = 0
        self._listed_at = -_RELIST_SECONDS

    @property
    def used_bytes(self) -> int:
        """Bytes of all units that are known to be here."""
        return self._used

    def take(
        self, manifest: Manifest, objects: Sequence[memoryview | None]
    ) -> tuple[set[int], int]:
        """Take room for the units of a segment, before they are written.

        Returns the indices of the objects that have room, and how many units were refused; a unit
        of which an object is None is neither.
        """
        units = {
            name: (indices, size)
            for name, (indices, size) in _units_of(manifest).items()
            if all(objects[index] is not None for index in indices)
        }
        refused = 0
        with self._lock:
            for name, (indices, size) in units.items():
                cost = manifest.offline_seconds * size / manifest.num_bytes
                if self._admit(name, size, cost):
                    unit = _Unit([manifest.object_keys[i] for i in indices], size)
                    self._insert(name, unit, cost)
                else:
                    refused += 1
            # The last ones may have pushed out the first.
            return {i for name in units if name in self._units for i in units[name][0]}, refused

    def forget(self, manifest: Manifest) -> None:
        """Count a segment out."""
        with self._lock:
            for name in _units_of(manifest):
                unit = self._units.pop(name, None)
                if unit is not None:
                    self._used -= unit.num_bytes
                    self._policy.remove(name)

    def touch(self, manifest: Manifest, object_indices: Sequence[int]) -> None:
        """Tell the policy that objects of a segment were read, in this order."""
        regions = manifest.layout.object_regions
        with self._lock:
            for i in object_indices:
                region = REGIONS[regions[i]] if i < len(regions) else "hidden"
                self._policy.touch(f"{manifest.key}/{region}")

    def drop(self, num_bytes: int) -> bool:
        """Drop units of `num_bytes` or more, as far as there are any; whether any was dropped."""
        with self._lock:
            before = self._used
            self._drop_to(before - num_bytes)
            return self._used < before

    def _drop_to(self, target: int) -> None:
        while self._used > target:
            name = self._policy.victim()
            if name is None:
                return
            unit = self._units.pop(name)
            self._policy.remove(name)
            self._used -= unit.num_bytes
            key = name.rsplit("/", 1)[0]
            keys = list(unit.object_keys)
            if not any(f"{key}/{region}" in self._units for region in (*REGIONS, "hidden")):
                keys.insert(0, f"m/{key}")
            self._drop_items(keys, unit.num_bytes)

    def _insert(self, name: str, unit: _Unit, cost: float) -> None:
        old = self._units.get(name)
        self._used += unit.num_bytes - (old.num_bytes if old else 0)
        self._units[name] = unit
        self._policy.insert(name, unit.num_bytes, cost)

    def _admit(self, name: str, num_bytes: int, cost: float) -> bool:
        self._policy.touch(name)
        capacity = self._capacity
        if capacity is None:
            return True
        self._list_others()
        if num_bytes > capacity:
            return False
        if not self._policy.admit(name, num_bytes, cost, capacity - self._used):
            return False
        self._drop_to(capacity - num_bytes)
        return self._used <= capacity - num_bytes

    def _list_others(self) -> None:
        """Count in what was there at the start, and what other processes have written."""
        if time.monotonic() - self._listed_at < _RELIST_SECONDS:
            return
        self._listed_at = time.monotonic()
        objects = self._list_objects()
        if objects is None:
            return
        found: dict[str, _Unit] = {}
        for item, size in objects.items():
            _, key, _, name = item.split("/")
            unit = found.setdefault(f"{key}/{name.rsplit('-', 1)[0]}", _Unit([], 0))
            unit.object_keys.append(item)
            unit.num_bytes += size
        for gone in [name for name in self._units if name not in found]:
            self._used -= self._units.pop(gone).num_bytes
            self._policy.remove(gone)
        for name, unit in found.items():
            if name not in self._units:
                self._insert(name, unit, 0.0)


def _units_of(manifest: Manifest) -> dict[str, tuple[list[int], int]]:
    """Object indices and bytes of each unit of a segment, coldest first."""
    units: dict[str, tuple[list[int], int]] = {}
    layout = manifest.layout
    for number, region in enumerate(REGIONS):
        indices = [i for i, r in enumerate(layout.object_regions) if r == number]
        if indices:
            size = sum(layout.object_sizes[i] for i in indices)
            units[f"{manifest.key}/{region}"] = (indices, size)
    if manifest.hidden_layer >= 0:
        units[f"{manifest.key}/hidden"] = ([layout.num_objects], manifest.num_hidden_bytes)
    return units
