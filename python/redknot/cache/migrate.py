"""Moving whole sessions from one page pool to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from redknot.cache.pool import KVPool

__all__ = ["migrate_sessions"]


def migrate_sessions(
    source: KVPool,
    target: KVPool,
    sessions: Sequence[int],
    windows: NDArray[np.int32],
    sinks: NDArray[np.int32],
) -> list[int]:
    """Copy sessions, built by appended tokens alone, to a pool of equal shape and page size.

    Each session is appended anew, so that the target's rows hold what the rules keep of it; then
    the contents of those pages are copied. Pages that sessions shared are no longer shared.

    Returns
    -------
    list of int
        The target's sessions, in the order of `sessions`; those of the source stay.
    """
    moved = []
    for session in sessions:
        copy = target.allocator.create_session(windows, sinks)
        length = source.allocator.session_length(session)
        for begin in range(0, length, target.page_size):
            step = min(target.page_size, length - begin)
            target.allocator.append_tokens([copy], [step], expire_first=True)
        target.allocator.expire(copy)
        moved.append(copy)
        for layer in range(len(windows)):
            old_pages = _page_of_position(source, session, layer)
            new_pages = _page_of_position(target, copy, layer)
            index = np.array([(old_pages[key], page) for key, page in new_pages.items()])
            if len(index):
                from_pages, to_pages = torch.from_numpy(index).to(source.k_cache.device).T
                target.k_cache[to_pages] = source.k_cache[from_pages]
                target.v_cache[to_pages] = source.v_cache[from_pages]
    return moved


def _page_of_position(pool: KVPool, session: int, layer: int) -> dict[tuple[int, int], int]:
    """Pages of a session's layer by (KV head, position of the first slot)."""
    indptr, refs = pool.allocator.rows([session], layer)
    heads = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return {
        (int(head), int(first)): int(page)
        for head, (page, first, *_) in zip(heads, refs, strict=True)
    }
