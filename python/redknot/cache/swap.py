"""Host memory for the pages of preempted sessions, by the slot numbers of the allocator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["SwapSpace"]


class SwapSpace:
    """K and V of pages that have left a pool; grows as needed.

    Parameters
    ----------
    like : Tensor [num_pages, page_size, head_dim]
        The pool's pages, for shape and dtype.
    """

    def __init__(self, like: Tensor) -> None:
        # Pinned where the pool is on a GPU, for copies at full speed.
        self._pinned = like.device.type == "cuda"
        self._empty = torch.empty((0, *like.shape[1:]), dtype=like.dtype)
        self._k, self._v = self._empty, self._empty

    def put(self, slots: np.ndarray, k: Tensor, v: Tensor) -> None:
        """Keep k, v [n, page_size, head_dim] under `slots` [n]."""
        index = torch.from_numpy(slots.astype(np.int64))
        self._reserve(int(slots.max()) + 1)
        self._k[index], self._v[index] = k.cpu(), v.cpu()

    def get(self, slots: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """K and V [n, page_size, head_dim] of `slots` [n], on `device`."""
        index = torch.from_numpy(slots.astype(np.int64))
        return self._k[index].to(device), self._v[index].to(device)

    def clear(self) -> None:
        """Give the memory back."""
        self._k, self._v = self._empty, self._empty

    def _reserve(self, num_slots: int) -> None:
        if num_slots <= len(self._k):
            return
        capacity = max(num_slots, 2 * len(self._k))
        larger = [
            torch.empty((capacity, *old.shape[1:]), dtype=old.dtype, pin_memory=self._pinned)
            for old in (self._k, self._v)
        ]
        for new, old in zip(larger, (self._k, self._v), strict=True):
            new[: len(old)] = old
        self._k, self._v = larger
