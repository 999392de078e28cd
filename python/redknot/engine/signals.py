"""What makes a row important: read off the attention of the global heads, or off new K and V."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redknot import ops
from redknot.cache import KVPool
from redknot.recovery import PromptLayout
from redknot.recovery.plan import FfnRule

__all__ = ["GlobalRows", "foreign_part", "kv_shift", "select_rows"]

# Rows whose fp32 copies stay in a CPU's caches.
_CACHED_ROWS = 256


@dataclass(frozen=True)
class GlobalRows:
    """Pages of the global heads of one layer of a session: all of them, and by document.

    The rows of all global heads hold the same positions in pages of the same shape, because every
    one keeps everything.

    Attributes
    ----------
    heads : tuple of int
        The KV heads.
    refs : np.ndarray [len(heads), num_refs, 4]
        Page references of each (see `redknot.ops.seg_paged_attention`).
    """

    heads: tuple[int, ...]
    refs: np.ndarray
    layout: PromptLayout

    @classmethod
    def of(
        cls, pool: KVPool, session: int, layer: int, heads: np.ndarray, layout: PromptLayout
    ) -> GlobalRows:
        """Look them up."""
        indptr, refs = pool.allocator.rows([session], layer)
        rows = [refs[indptr[head] : indptr[head + 1]] for head in heads]
        return cls(tuple(int(head) for head in heads), np.stack(rows), layout)

    def everything(self) -> tuple[np.ndarray, np.ndarray]:
        """(row_indptr, page_refs) of one sequence that sees all pages."""
        num_heads, num_refs, _ = self.refs.shape
        indptr = np.arange(0, num_heads * num_refs + 1, num_refs, dtype=np.int32)
        return indptr, np.ascontiguousarray(self.refs.reshape(-1, 4))

    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """The same of one sequence for each document, which sees the prefix and that document."""
        first = self.refs[0, :, 1]
        prefix = np.arange(np.searchsorted(first, self.layout.prefix_end))
        parts, counts = [np.empty((0, 4), np.int32)], [0]
        for document in self.layout.documents:
            pages = np.arange(*np.searchsorted(first, (document.begin, document.end)))
            wanted = np.concatenate([prefix, pages])
            parts.append(self.refs[:, wanted].reshape(-1, 4))
            counts += [len(wanted)] * len(self.heads)
        return np.cumsum(counts, dtype=np.int32), np.concatenate(parts)


def foreign_part(out: Tensor, lse: Tensor, own_out: Tensor, own_lse: Tensor) -> Tensor:
    """Norm [num_rows] fp32 of what attention brought from other segments.

    Softmax over all keys is a mixture of the own and the foreign keys' outputs; without the own
    keys' share exp(own_lse - lse) of it, the foreign one's is left.

    Parameters
    ----------
    out, own_out : Tensor [num_rows, num_heads, head_dim]
        Attention over everything, and over the row's own segment and the prefix.
    lse, own_lse : Tensor [num_heads, num_rows]
    """
    share = torch.exp(own_lse - lse).T[:, :, None]
    num_rows = _CACHED_ROWS if out.device.type == "cpu" else max(len(out), 1)
    parts = zip(out.split(num_rows), share.split(num_rows), own_out.split(num_rows), strict=True)
    return torch.cat(
        [ops.token_importance(whole.float() - of * own.float()) for whole, of, own in parts]
    )


def kv_shift(k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
    """Squared distance [num_rows] fp32 of new K and V [num_rows, num_heads, head_dim] from old."""
    return (k.float() - old_k).square().sum((1, 2)) + (v.float() - old_v).square().sum((1, 2))


def select_rows(importance: Tensor, rule: FfnRule, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose FFN runs, as (indices [num_rows] int32 padded, count [1] int32).

    `importance` [num_rows] fp32, `forced` [num_rows] bool. Everything stays on the device: the
    host never waits for the count.
    """
    num_rows, device = len(importance), importance.device
    index = torch.arange(num_rows, dtype=torch.int32, device=device)
    chosen, count = ops.select_tokens(
        importance,
        torch.tensor([0, num_rows], dtype=torch.int32, device=device),
        mass=rule.mass,
        recent_n=0,
        min_keep=rule.min_keep,
    )
    # One slot more than rows takes the padding.
    keep = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)
    keep[torch.where(index < count, chosen, num_rows).long()] = True
    keep[:num_rows] |= forced
    keep = keep[:num_rows]
    place = torch.where(keep, keep.cumsum(0) - 1, num_rows)
    indices = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    indices[place] = index
    return indices[:num_rows], keep.sum(dtype=torch.int32).reshape(1)
