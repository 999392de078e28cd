"""redknot: head-aware KV cache reuse, paged attention and sparse FFN.

Importing this package has no effect but names; torch and transformers are imported by what is used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redknot.engine import (
        Engine,
        Explanation,
        Generation,
        GenerationRequest,
        Prefill,
        Sampling,
        Session,
    )
    from redknot.errors import (
        BudgetError,
        HeadMapError,
        InputError,
        ModelError,
        RedknotError,
        UnknownDocumentError,
    )
    from redknot.eval.profiling import HeadProfile, profile_heads
    from redknot.heads import HeadMap
    from redknot.models.attach import attach, detach
    from redknot.models.hf_compat import register_attention
    from redknot.models.seg_paged_cache import SegPagedCache
    from redknot.models.sparse_ffn import SparseFFN
    from redknot.recovery import Dense, LiveSpan, Naive, RedKnot

# The one list of what `redknot.` offers, and the module each name lives in.
_HOME = {
    "BudgetError": "redknot.errors",
    "Dense": "redknot.recovery",
    "Engine": "redknot.engine",
    "Explanation": "redknot.engine",
    "Generation": "redknot.engine",
    "GenerationRequest": "redknot.engine",
    "HeadMap": "redknot.heads",
    "HeadMapError": "redknot.errors",
    "HeadProfile": "redknot.eval.profiling",
    "InputError": "redknot.errors",
    "LiveSpan": "redknot.recovery",
    "ModelError": "redknot.errors",
    "Naive": "redknot.recovery",
    "Prefill": "redknot.engine",
    "RedKnot": "redknot.recovery",
    "RedknotError": "redknot.errors",
    "Sampling": "redknot.engine",
    "SegPagedCache": "redknot.models.seg_paged_cache",
    "Session": "redknot.engine",
    "SparseFFN": "redknot.models.sparse_ffn",
    "UnknownDocumentError": "redknot.errors",
    "attach": "redknot.models.attach",
    "detach": "redknot.models.attach",
    "profile_heads": "redknot.eval.profiling",
    "register_attention": "redknot.models.hf_compat",
}

__all__ = [
    "BudgetError",
    "Dense",
    "Engine",
    "Explanation",
    "Generation",
    "GenerationRequest",
    "HeadMap",
    "HeadMapError",
    "HeadProfile",
    "InputError",
    "LiveSpan",
    "ModelError",
    "Naive",
    "Prefill",
    "RedKnot",
    "RedknotError",
    "Sampling",
    "SegPagedCache",
    "Session",
    "SparseFFN",
    "UnknownDocumentError",
    "attach",
    "detach",
    "profile_heads",
    "register_attention",
]

try:
    __version__ = version("redknot")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'redknot' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
