"""How large the page pool of one cache is, at first and at most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redknot.cache.pool import KVPool, bytes_per_page
from redknot.checks import check_count
from redknot.errors import BudgetError, InputError

__all__ = ["PoolOptions"]

# Without a known length the first pool leaves room for a quarter more tokens, at least this many.
_SPARE_TOKENS = 256


@dataclass(frozen=True)
class PoolOptions:
    """Size of a pool. With neither `num_pages` nor `budget_bytes` it grows as needed.

    Parameters
    ----------
    page_size : int
        Token slots per page.
    num_pages, budget_bytes : int, optional
        Fixed size, in pages or in bytes of K and V.
    max_tokens : int, optional
        Most tokens per row of the batch; a growing pool is made for them at once.
    dtype, device : optional
        Of the pages; by default those of the first keys.
    """

    page_size: int = 64
    num_pages: int | None = None
    budget_bytes: int | None = None
    max_tokens: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for option in ("page_size", "num_pages", "budget_bytes", "max_tokens"):
            value = getattr(self, option)
            if value is not None or option == "page_size":
                check_count(option, value)
        if self.num_pages is not None and self.budget_bytes is not None:
            raise InputError("give either num_pages or budget_bytes, not both")

    def fixed_pages(self, head_dim: int, dtype: torch.dtype) -> int | None:
        """Pages that the options allow; None where the pool grows."""
        if self.budget_bytes is None:
            return self.num_pages
        page_bytes = bytes_per_page(self.page_size, head_dim, self.dtype or dtype)
        if self.budget_bytes < page_bytes:
            raise BudgetError(
                f"a KV budget of {self.budget_bytes} bytes is less than one page of {page_bytes}"
            )
        return self.budget_bytes // page_bytes

    def first_pages(
        self,
        windows: NDArray[np.int32],
        sinks: NDArray[np.int32],
        num_tokens: NDArray[np.int64],
        head_dim: int,
        dtype: torch.dtype,
        *,
        by_layer: bool = False,
    ) -> int:
        """Pages to begin with when the first forward pass has `num_tokens` [batch] tokens.

        With `by_layer` the local heads of one layer alone hold the whole pass at once.
        """
        fixed = self.fixed_pages(head_dim, dtype)
        if fixed is not None:
            return fixed
        step = int(num_tokens.max())
        length = self.max_tokens or step + max(_SPARE_TOKENS, step // 4)
        whole = -(-length // self.page_size)
        seen = windows.astype(np.int64) + (0 if by_layer else step)
        local = np.minimum(whole, -(-sinks // self.page_size) + seen // self.page_size + 2)
        kept = np.where(windows < 0, whole, local)
        most = (whole - kept).sum(axis=1).max() if by_layer else 0
        return len(num_tokens) * int(kept.sum() + most)

    def make_pool(self, shape: tuple[int, ...], like: Tensor, num_pages: int) -> KVPool:
        """Make a pool for `shape` (num_layers, num_kv_heads), with the head_dim of `like`."""
        num_layers, num_kv_heads = shape
        return KVPool(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=like.shape[-1],
            num_pages=num_pages,
            page_size=self.page_size,
            dtype=self.dtype or like.dtype,
            device=self.device or like.device,
        )
