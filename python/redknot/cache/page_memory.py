"""Memory of a page pool."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from redknot import _memory

__all__ = ["empty_pages"]

_HUGE_PAGE = 2 << 20


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Contiguous tensor, not written to: on the host in huge pages where the system has them.

    There it begins where a huge page does, so that no page of the pool lies in more pages of
    memory than it must: a processor prefetches within one of them.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    num_elements = math.prod(shape)
    memory = torch.empty(num_elements + _HUGE_PAGE // dtype.itemsize, dtype=dtype)
    begin = -memory.data_ptr() % _HUGE_PAGE // dtype.itemsize
    pages = memory[begin : begin + num_elements].view(shape)
    _memory.advise_huge_pages(pages.data_ptr(), pages.nbytes)
    return pages
