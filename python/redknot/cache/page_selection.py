"""Retrieval heads while decoding: every page is kept, and those that matter are read.

A page is told from its mean key alone. With k the n keys of a page, log(n) + q . mean(k) is never
more than the log of the page's true share of the softmax, and is equal where its keys are alike; so
pages seem flatter than they are, and rather too many are read than too few. Pages by falling
estimate are read until they hold `top_p` of the estimated mass, for each query head of the group;
the first page (the sink) and the last one (what was just said) always.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redknot import ops
from redknot.heads import HeadMap

__all__ = ["PageSelector", "select_pages"]

# Pages whose keys are averaged at once: bounds the fp32 copy of them.
_PAGES_AT_ONCE = 512


class PageSelector:
    """Chooses the pages that retrieval heads of some sessions read; remembers their mean keys.

    Pages of a session are only appended to, so a mean is taken once for each full page and for the
    last one in each step. Where anything else may have happened to a session, `forget` it.

    Parameters
    ----------
    is_retrieval : bool [num_layers, num_kv_heads]
    top_p : float
        Below 1.
    """

    def __init__(self, is_retrieval: NDArray[np.bool_], top_p: float) -> None:
        self.top_p = top_p
        self._heads = [np.flatnonzero(row) for row in is_retrieval]
        self._known: dict[tuple[int, int, int], tuple[NDArray[np.int32], Tensor]] = {}
        self.pages_read = self.pages_held = 0

    @classmethod
    def of(cls, heads: HeadMap) -> PageSelector | None:
        """Return the selector of a map; None where every head reads all that it keeps."""
        if heads.retrieval_top_p >= 1 or not heads.is_retrieval.any():
            return None
        return cls(heads.is_retrieval, heads.retrieval_top_p)

    @property
    def page_share(self) -> float | None:
        """Share of the pages held that was read so far; None before the first query."""
        return self.pages_read / self.pages_held if self.pages_held else None

    def heads(self, layer: int) -> NDArray[np.int64]:
        """KV heads of a layer that select."""
        return self._heads[layer]

    def forget(self, session: int) -> None:
        """Take the means of a session anew when it is read next."""
        for key in [key for key in self._known if key[0] == session]:
            del self._known[key]

    def select(
        self,
        session: int,
        layer: int,
        head: int,
        q: Tensor,
        k_cache: Tensor,
        refs: NDArray[np.int32],
        softmax_scale: float,
        softcap: float,
        inv_freq: Tensor | None,
    ) -> NDArray[np.bool_]:
        """Choose the references that one query reads.

        Parameters
        ----------
        q : Tensor [group_size, head_dim]
            Of this KV head's query heads, rotated.
        k_cache : Tensor [num_pages, page_size, head_dim]
        refs : int32 [num_refs, 4]
            The row's page references.

        Returns
        -------
        bool [num_refs]
        """
        kept = np.ones(len(refs), dtype=bool)
        if len(refs) > 2:
            means = self._means((session, layer, head), k_cache, refs, inv_freq)
            valid = torch.from_numpy(refs[:, 2]).to(q.device)
            scores = q.float() @ means.T * softmax_scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            mass, order = (scores + valid.log()).softmax(-1).sort(dim=-1, descending=True)
            enough = mass.cumsum(-1) - mass >= self.top_p  # held already without this page
            read = torch.ones_like(enough).scatter_(1, order, ~enough).any(0)
            kept = read.cpu().numpy()
            kept[[0, -1]] = True
        self.pages_held += len(refs)
        self.pages_read += int(kept.sum())
        return kept

    def _means(
        self,
        key: tuple[int, int, int],
        k_cache: Tensor,
        refs: NDArray[np.int32],
        inv_freq: Tensor | None,
    ) -> Tensor:
        """Mean keys [num_refs, head_dim] fp32 of a row, rotated at their true positions."""
        known_refs, known = self._known.get(key, (refs[:0], k_cache.new_empty(0).float()))
        common = min(len(known_refs), len(refs))
        same = (known_refs[:common] == refs[:common]).all(axis=1)
        first = common if same.all() else int(same.argmin())
        parts = [known[:first].view(first, k_cache.shape[2])]
        for begin in range(first, len(refs), _PAGES_AT_ONCE):
            parts.append(_mean_keys(k_cache, refs[begin : begin + _PAGES_AT_ONCE], inv_freq))
        means = torch.cat(parts)
        self._known[key] = (refs.copy(), means)
        return means


def _mean_keys(k_cache: Tensor, refs: NDArray[np.int32], inv_freq: Tensor | None) -> Tensor:
    on_device = torch.from_numpy(np.ascontiguousarray(refs)).to(k_cache.device)
    page, _, valid, offset = on_device.unbind(1)
    keys = k_cache[page.long()].float()
    # What lies behind the valid slots may be anything, NaN included.
    outside = torch.arange(keys.shape[1], device=keys.device) >= valid[:, None]
    means = keys.masked_fill_(outside[..., None], 0).sum(1) / valid[:, None]
    if inv_freq is not None and bool((refs[:, 3] != 0).any()):  # a rotation is linear
        means = ops.rope_realign(means[:, None], offset.contiguous(), inv_freq)[:, 0]
    return means


def select_pages(
    selectors: Sequence[PageSelector | None],
    sessions: Sequence[int],
    num_queries: Sequence[int],
    layer: int,
    q: Tensor,
    k_cache: Tensor,
    row_indptr: NDArray[np.int32],
    page_refs: NDArray[np.int32],
    *,
    softmax_scale: float | None,
    softcap: float,
    inv_freq: Tensor | None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Leave out the pages that retrieval heads do not read; rows of all other heads stay.

    Sessions with more than one query read everything.

    Parameters
    ----------
    selectors : sequence of PageSelector or None, [num_sessions]
    num_queries : sequence of int, [num_sessions]
    q : Tensor [sum(num_queries), num_q_heads, head_dim]
    row_indptr, page_refs : int32 [num_sessions * num_kv_heads + 1], [num_refs, 4]

    Returns
    -------
    row_indptr, page_refs
        Of the same rows.
    """
    num_kv_heads = (len(row_indptr) - 1) // len(sessions)
    group = q.shape[1] // num_kv_heads
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    kept = np.ones(len(page_refs), dtype=bool)
    token = 0
    for number, (selector, session) in enumerate(zip(selectors, sessions, strict=True)):
        if selector is not None and num_queries[number] != 1:
            selector.forget(session)
        elif selector is not None:
            for head in selector.heads(layer):
                row = number * num_kv_heads + int(head)
                refs = slice(int(row_indptr[row]), int(row_indptr[row + 1]))
                own = q[token, head * group : (head + 1) * group]
                kept[refs] = selector.select(
                    session,
                    layer,
                    int(head),
                    own,
                    k_cache,
                    page_refs[refs],
                    scale,
                    softcap,
                    inv_freq,
                )
        token += int(num_queries[number])
    counts = np.concatenate([[0], np.cumsum(kept)])
    return counts[row_indptr].astype(np.int32), np.ascontiguousarray(page_refs[kept])
