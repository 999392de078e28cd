"""Exact counts that follow from the visibility rule of a head; plain arrays in, arrays out.

The rule, the only meaning of "local" there is: key j is visible to query i when
`j <= i and (window < 0 or j < sink or j > i - window)`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["held_pages", "held_tokens", "visible_pairs"]

IntArray = NDArray[np.int64]


def held_tokens(context: int, windows: NDArray, sinks: NDArray) -> IntArray:
    """Tokens that each head keeps of a context: all of it, or sink + window of it.

    Parameters
    ----------
    context : int
        Tokens seen so far.
    windows, sinks : ndarray of int, same shape
        Per head; a negative window means a global head.
    """
    local = np.minimum(context, windows.astype(np.int64) + sinks)
    return np.where(windows < 0, np.int64(context), local)


def held_pages(context: int, windows: NDArray, sinks: NDArray, page_size: int) -> IntArray:
    """Pages that each head keeps of a context once expired pages are freed.

    Pages start at multiples of `page_size`. A local head keeps the pages that hold its sink or
    anything that the *next* token (position `context`) can see; so a window costs one page more
    where it starts in the middle of a page.
    """
    last = -(-context // page_size)  # one past the newest page
    sink_end = -(-np.minimum(sinks.astype(np.int64), context) // page_size)
    first_seen = np.clip(context - windows.astype(np.int64) + 1, 0, context)
    window_begin = np.where(first_seen < context, first_seen // page_size, last)
    local = sink_end + np.maximum(0, last - np.maximum(window_begin, sink_end))
    return np.where(windows < 0, np.int64(last), local)


def _sum_of_ramp(steps: IntArray, ceiling: IntArray) -> IntArray:
    """sum_{m=1..steps} min(m, ceiling), elementwise."""
    ramp = np.minimum(steps, ceiling)
    return ramp * (ramp + 1) // 2 + (steps - ramp) * ceiling


def visible_pairs(context: int, windows: NDArray, sinks: NDArray) -> IntArray:
    """(query, key) pairs that each head computes in a causal prefill of `context` tokens.

    Per query head: a KV head with a group of g query heads computes g times as many.
    """
    length = np.full(windows.shape, context, dtype=np.int64)
    window = np.where(windows < 0, length, np.minimum(windows, length)).astype(np.int64)
    return _sum_of_ramp(length, window) + _sum_of_ramp(length - window, sinks.astype(np.int64))
