"""A trunk of tokens and branches that each continue it: their rows, pages and attention.

Documents behind a prefix are branches of it; questions are branches of prefix + documents. Rows of
the trunk come first, then those of each branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redknot import ops

__all__ = ["Branches"]

_PAGE_SIZE = 64


class Branches:
    """Rows of a trunk and of branches that see the trunk and themselves.

    Parameters
    ----------
    trunk : int
        Tokens of the trunk, perhaps 0.
    branches : sequence of int
        Tokens of each branch; their positions begin at `trunk`.
    num_kv_heads : int
    device : torch.device

    Attributes
    ----------
    num_rows : int
    positions : int32 Tensor [num_rows]
    """

    def __init__(
        self, trunk: int, branches: Sequence[int], num_kv_heads: int, device: torch.device
    ) -> None:
        self.trunk = trunk
        lengths = np.array([trunk, *branches], dtype=np.int64)
        first = np.array([0] + [trunk] * len(branches), dtype=np.int64)
        pages = -(-lengths // _PAGE_SIZE)
        page_begin = np.concatenate([[0], np.cumsum(pages)])
        self.num_rows = int(lengths.sum())
        self._num_slots = int(page_begin[-1]) * _PAGE_SIZE
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = [np.arange(f, f + n) for f, n in zip(first, lengths, strict=True)]
        slots = [
            np.arange(b * _PAGE_SIZE, b * _PAGE_SIZE + n)
            for b, n in zip(page_begin, lengths, strict=False)
        ]

        def on_device(array: np.ndarray, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.as_tensor(array, dtype=dtype, device=device)

        self.positions = on_device(np.concatenate(positions))
        self._slots = on_device(np.concatenate(slots), torch.int64)
        self._cu_seqlens = on_device(self._bounds)
        only_branches = self._bounds - trunk
        only_branches[0] = 0
        self._cu_seqlens_branches = on_device(only_branches)

        def refs(part: int) -> np.ndarray:
            """Page, first position, valid slots, rotation offset of one part, in head 0."""
            number = np.arange(pages[part])
            valid = np.minimum(_PAGE_SIZE, lengths[part] - number * _PAGE_SIZE)
            columns = [page_begin[part] + number, first[part] + number * _PAGE_SIZE, valid]
            return np.stack([*columns, np.zeros_like(number)], axis=1)

        rows, counts = [], []
        pages_per_head = np.array([page_begin[-1], 0, 0, 0])
        for part in range(len(lengths)):
            row = refs(0) if part == 0 else np.concatenate([refs(0), refs(part)])
            rows += [row + head * pages_per_head for head in range(num_kv_heads)]
            counts += [len(row)] * num_kv_heads
        self._page_refs = on_device(np.concatenate(rows))
        self._row_indptr = on_device(np.concatenate([[0], np.cumsum(counts)]))
        self._num_sequences = len(lengths)

    def rows_of(self, branch: int) -> slice:
        """Rows of one branch."""
        return slice(int(self._bounds[branch + 1]), int(self._bounds[branch + 2]))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: Tensor,
        sinks: Tensor,
        softmax_scale: float,
        softcap: float,
        *,
        branches_only: bool = False,
    ) -> Tensor:
        """Attention of all rows, or of the branches' rows alone, under one rule per KV head.

        Parameters
        ----------
        q : Tensor [num_rows (or the branches'), num_q_heads, head_dim]
            Rotated, as are the keys.
        k, v : Tensor [num_rows, num_kv_heads, head_dim]
        windows, sinks : int32 Tensor [num_kv_heads]
            Window -1: global.

        Returns
        -------
        Tensor
            Like q.
        """
        first = self.trunk if branches_only else 0
        out, _ = ops.seg_paged_attention(
            q,
            self._paged(k),
            self._paged(v),
            self._row_indptr,
            self._page_refs,
            self._cu_seqlens_branches if branches_only else self._cu_seqlens,
            self.positions[first:],
            windows.repeat(self._num_sequences),
            sinks.repeat(self._num_sequences),
            softmax_scale=softmax_scale,
            softcap=softcap,
        )
        return out

    def _paged(self, x: Tensor) -> Tensor:
        """Return rows [num_rows, heads, head_dim] as pages, each part from a page's start."""
        pages = x.new_zeros((x.shape[1], self._num_slots, x.shape[2]))
        pages[:, self._slots] = x.transpose(0, 1)
        return pages.view(-1, _PAGE_SIZE, x.shape[2])
