"""How large the pool is: from "8GiB" to a number of pages."""

from __future__ import annotations

import os

import torch

from redknot.errors import BudgetError, InputError
from redknot.store import parse_size

__all__ = ["num_pages_of", "parse_bytes"]

# Share of the free memory that a pool takes when no budget is given; weights and work need room.
_DEFAULT_SHARE = 0.25


def parse_bytes(budget: str | int | None, device: torch.device | None = None) -> int:
    """Bytes of a budget: a number, "8GiB"; None: a quarter of the device's free memory."""
    if budget is None:
        free = (
            torch.cuda.mem_get_info(device)[0]
            if device is not None and device.type == "cuda"
            else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        return int(free * _DEFAULT_SHARE)
    num_bytes = parse_size(budget, "kv_budget")
    if num_bytes < 1:
        raise InputError(f"kv_budget must be positive, got {budget!r}")
    return num_bytes


def num_pages_of(budget_bytes: int, page_bytes: int, rows: int) -> int:
    """Pages in a budget; at least one for each of `rows` (layer, KV head) pairs must fit."""
    num_pages = min(budget_bytes // page_bytes, 2**31 - 1)
    if num_pages < rows:
        raise BudgetError(
            f"kv_budget of {budget_bytes:,} bytes holds {num_pages} pages of {page_bytes:,} bytes, "
            f"but one token alone needs {rows} (one for each layer and KV head); raise kv_budget"
        )
    return int(num_pages)
