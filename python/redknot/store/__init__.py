"""Segments, the tiers they are kept in, and the storage engines below.

Names are imported when they are used: a command about stored bytes does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redknot.store.backend import ItemWrite, RangeRead, Status, StorageBackend
    from redknot.store.keys import LAYOUT_VERSION, model_fingerprint, segment_key, stored_parts
    from redknot.store.manifest import Manifest
    from redknot.store.memory_store import MemoryStore, StoreStats
    from redknot.store.reading import Loaded
    from redknot.store.segment import Segment
    from redknot.store.tier import Tier, TierCounts
    from redknot.store.tiers import Expected, Missed, TieredStore, open_tiers
    from redknot.store.url import StoreUrl, open_backend, parse_size, parse_url

_HOME = {
    "Expected": "tiers",
    "ItemWrite": "backend",
    "LAYOUT_VERSION": "keys",
    "Loaded": "reading",
    "Manifest": "manifest",
    "MemoryStore": "memory_store",
    "Missed": "tiers",
    "RangeRead": "backend",
    "Segment": "segment",
    "Status": "backend",
    "StorageBackend": "backend",
    "StoreStats": "memory_store",
    "StoreUrl": "url",
    "Tier": "tier",
    "TierCounts": "tier",
    "TieredStore": "tiers",
    "model_fingerprint": "keys",
    "open_backend": "url",
    "open_tiers": "tiers",
    "parse_size": "url",
    "parse_url": "url",
    "segment_key": "keys",
    "stored_parts": "keys",
}

__all__ = [
    "LAYOUT_VERSION",
    "Expected",
    "ItemWrite",
    "Loaded",
    "Manifest",
    "MemoryStore",
    "Missed",
    "RangeRead",
    "Segment",
    "Status",
    "StorageBackend",
    "StoreStats",
    "StoreUrl",
    "Tier",
    "TierCounts",
    "TieredStore",
    "model_fingerprint",
    "open_backend",
    "open_tiers",
    "parse_size",
    "parse_url",
    "segment_key",
    "stored_parts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'redknot.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"redknot.store.{_HOME[name]}"), name)
