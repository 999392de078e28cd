"""Segments and where they are kept."""

from redknot.store.keys import LAYOUT_VERSION, model_fingerprint, segment_key, stored_parts
from redknot.store.memory_store import MemoryStore, StoreStats
from redknot.store.segment import Segment

__all__ = [
    "LAYOUT_VERSION",
    "MemoryStore",
    "Segment",
    "StoreStats",
    "model_fingerprint",
    "segment_key",
    "stored_parts",
]
