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

__all__ = ["GlobalRows", "foreign_part", "kv_shift", "select_rows", "weight_read"]

# Rows whose fp32 copies stay in a CPU's caches, and weights that do.
_CACHED_ROWS, _CACHED_WEIGHTS = 128, 1 << 19


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
        first, (num_heads, num_refs, _) = self.refs[0, :, 1], self.refs.shape
        prefix = np.arange(np.searchsorted(first, self.layout.prefix_end))
        rows = np.arange(num_heads)[:, None] * num_refs
        bounds = np.array([(d.begin, d.end) for d in self.layout.documents]).reshape(-1, 2)
        parts, counts = [np.empty(0, np.int64)], [0]
        for begin, end in np.searchsorted(first, bounds).tolist():
            wanted = np.concatenate([prefix, np.arange(begin, end)])
            parts.append((rows + wanted).ravel())
            counts += [len(wanted)] * num_heads
        refs = self.refs.reshape(-1, 4)[np.concatenate(parts)]
        return np.cumsum(counts, dtype=np.int32), refs


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
    share = torch.exp(own_lse - lse).T[:, :, None].contiguous()
    num_rows = _CACHED_ROWS if out.device.type == "cpu" else max(len(out), 1)
    parts = zip(out.split(num_rows), share.split(num_rows), own_out.split(num_rows), strict=True)
    return torch.cat(
        [
            ops.token_importance(torch.addcmul(whole.float(), own.float(), of, value=-1))
            for whole, of, own in parts
        ]
    )


def weight_read(
    q: Tensor,
    lse: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    window: int,
    softmax_scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Softmax weight [num_keys] fp32 that rows give to each key, over all rows and heads.

    Parameters
    ----------
    q : Tensor [num_rows, num_q_heads, head_dim]
    lse : Tensor [num_q_heads, num_rows]
        Of each row over all keys that it sees, `k` and others.
    k : Tensor [num_keys, num_kv_heads, head_dim]
        Turned to their true positions, like `q`.
    q_positions, k_positions : Tensor [num_rows], [num_keys]
    window : int
        How far all of the heads see; negative: everything.
    softcap : float
        Of the scores; 0: none.
    """
    read = torch.zeros(len(k), device=k.device)
    num_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    heads = [slice(head * group, (head + 1) * group) for head in range(num_heads)]
    queries = [(q[:, head] * softmax_scale).flatten(0, 1) for head in heads]
    sums = [lse[head].T.reshape(-1, 1) for head in heads]
    num_keys = max(_CACHED_WEIGHTS // max(len(queries[0]), 1), 1)
    for begin in range(0, len(k), num_keys):
        keys = slice(begin, begin + num_keys)
        seen = k_positions[keys] <= q_positions[:, None]
        if window >= 0:
            seen &= k_positions[keys] > q_positions[:, None] - window
        seen = seen[:, None].float()
        for head in range(num_heads):
            scores = (queries[head] @ k[keys, head].T).float()
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            # Weights of what is seen are at most 1, and exp is slow for minus infinity.
            weights = scores.sub_(sums[head]).clamp_(max=0.0).exp_()
            read[keys] += weights.unflatten(0, (-1, group)).mul_(seen).sum((0, 1))
    return read


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
