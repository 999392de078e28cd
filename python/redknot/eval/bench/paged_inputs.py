"""Inputs of attention cases: rows of pages that lie scattered in a pool, as in use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from redknot import ops
from redknot.cache import empty_pages
from redknot.eval.bench.options import Options
from redknot.recovery import ModelShape
from redknot.recovery.ledger import visible_keys

__all__ = ["Case", "Paged", "build", "copy_in_huge_pages", "fill_random"]

_BLOCK = 1 << 20


def copy_in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy that a peer may read as fast as we read our pages."""
    return empty_pages(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)


def fill_random(tensor: Tensor, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Fill a contiguous tensor with normal numbers, repeated every 2^20 + 7 of them: fast."""
    flat = tensor.view(-1)
    generator = torch.Generator().manual_seed(seed)
    block = (scale * torch.randn(min(_BLOCK + 7, len(flat)), generator=generator)).to(tensor)
    for begin in range(0, len(flat), len(block)):
        part = flat[begin : begin + len(block)]
        part.copy_(block[: len(part)])
    return tensor


@dataclass(frozen=True)
class Case:
    """One attention case over sequences of `lengths` tokens.

    `heads` says which rows see everything: "global" all, "local" none (sink + window), "mixed"
    15 % of each sequence's KV heads, at least one.
    """

    shape: ModelShape
    kind: str
    heads: str
    lengths: tuple[int, ...]
    window: int = 1024
    sink: int = 128
    page_size: int = 64

    @cached_property
    def global_heads(self) -> np.ndarray:
        """Which KV heads see everything, bool [num_kv_heads]; the same in every sequence."""
        heads = np.zeros(self.shape.num_kv_heads, dtype=bool)
        share = {"global": 1.0, "mixed": 0.15, "local": 0.0}[self.heads]
        heads[: max(round(share * len(heads)), int(share > 0))] = True
        return heads

    def key_begins(self, length: int, is_global: bool) -> list[tuple[int, int]]:
        """Runs [begin, end) of positions that a row keeps: whole pages."""
        first_seen = length - self.window
        if self.kind == "prefill" or is_global or first_seen <= self.sink:
            return [(0, length)]
        sink_end = -(-self.sink // self.page_size) * self.page_size
        window_begin = first_seen // self.page_size * self.page_size
        return [(0, length)] if window_begin <= sink_end else [(0, sink_end),
                                                               (window_begin, length)]  # fmt: skip

    def visible(self) -> int:
        """(query, key) pairs of all rows of one query head."""
        pairs = 0
        for length in self.lengths:
            positions = np.arange(length) if self.kind == "prefill" else np.array([length - 1])
            for is_global in self.global_heads:
                window = -1 if is_global else self.window
                pairs += visible_keys(positions, window, self.sink)
        return pairs

    @property
    def flops(self) -> float:
        """Useful FLOPs: QK and PV of the visible pairs, for every query head."""
        return 4.0 * self.shape.head_dim * self.shape.group_size * self.visible()

    def num_bytes(self, itemsize: int) -> float:
        """Useful bytes: K and V that are seen, once, and queries and outputs."""
        shape = self.shape
        keys = sum(
            min(length, length if g else self.window + self.sink)
            for length in self.lengths
            for g in self.global_heads
        )
        if self.kind == "prefill":
            keys = sum(self.lengths) * shape.num_kv_heads
        tokens = sum(self.lengths) if self.kind == "prefill" else len(self.lengths)
        return float(itemsize * shape.head_dim * (2 * keys + 2 * tokens * shape.num_q_heads))


@dataclass(frozen=True)
class Paged:
    """Arguments of one call of `seg_paged_attention`."""

    case: Case
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    row_indptr: Tensor
    page_refs: Tensor
    cu_seqlens_q: Tensor
    q_positions: Tensor
    row_window: Tensor
    row_sink: Tensor
    plan: Tensor | None = None

    def make_plan(self) -> Tensor:
        """The work list of this call."""
        return ops.seg_paged_plan(
            self.row_indptr,
            self.cu_seqlens_q,
            self.q_positions,
            self.row_window,
            self.row_sink,
            self.case.shape.num_q_heads,
            self.case.page_size,
        )

    def attend(self) -> Tensor:
        """Output [num_tokens, num_q_heads, head_dim]."""
        out, _ = ops.seg_paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.row_indptr,
            self.page_refs,
            self.cu_seqlens_q,
            self.q_positions,
            self.row_window,
            self.row_sink,
            plan=self.plan,
        )
        return out

    def contiguous(self, sequence: int, heads: np.ndarray) -> tuple[Tensor, Tensor]:
        """K and V [num_heads, num_keys, head_dim] of rows that see equally many keys.

        For decode just the keys that are seen, for prefill all.
        """
        case = self.case
        length = case.lengths[sequence]
        taken = []
        for head in heads:
            row = sequence * case.shape.num_kv_heads + int(head)
            begin, end = self.row_indptr[row : row + 2].tolist()
            page, first, valid, _ = self.page_refs[begin:end].cpu().long().unbind(1)
            position = first[:, None] + torch.arange(case.page_size)
            seen = torch.arange(case.page_size) < valid[:, None]
            if case.kind == "decode" and not case.global_heads[head]:
                seen &= (position < case.sink) | (position >= length - case.window)
            taken.append((page[:, None] * case.page_size + torch.arange(case.page_size))[seen])
        index = torch.stack(taken).to(self.q.device)
        k, v = (
            copy_in_huge_pages(cache.view(-1, case.shape.head_dim)[index])
            for cache in (self.k_cache, self.v_cache)
        )
        return k, v


def build(case: Case, options: Options) -> list[Paged]:
    """Inputs of a case, as often as it takes to be larger than the cache together."""
    shape, device, dtype = case.shape, options.device, options.torch_dtype
    rows: list[np.ndarray] = []  # per row: [num_pages, 4], page numbers counted from 0
    next_page = 0
    for length in case.lengths:
        for is_global in case.global_heads:
            runs = case.key_begins(length, bool(is_global))
            first = np.concatenate([np.arange(b, e, case.page_size) for b, e in runs])
            valid = np.concatenate(
                [np.minimum(case.page_size, e - np.arange(b, e, case.page_size)) for b, e in runs]
            )
            pages = next_page + np.arange(len(first))
            next_page += len(first)
            rows.append(np.stack([pages, first, valid, np.zeros_like(first)], axis=1))
    indptr = np.cumsum([0] + [len(row) for row in rows])
    refs = np.concatenate(rows)
    page_bytes = 2 * case.page_size * shape.head_dim * dtype.itemsize
    copies = max(1, min(64, -(-options.rotation_bytes // (next_page * page_bytes))))
    scattered = np.random.default_rng(0).permutation(copies * next_page)
    caches = [
        fill_random(
            empty_pages((copies * next_page, case.page_size, shape.head_dim), dtype, device),
            seed=seed,
        )
        for seed in (1, 2)
    ]
    positions = [
        np.arange(length) if case.kind == "prefill" else np.array([length - 1])
        for length in case.lengths
    ]
    bounds = np.cumsum([0] + [len(p) for p in positions])

    def index(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    inputs = []
    for copy in range(copies):
        own = refs.copy()
        own[:, 0] = scattered[refs[:, 0] + copy * next_page]
        q = torch.empty(
            int(bounds[-1]), shape.num_q_heads, shape.head_dim, dtype=dtype, device=device
        )
        inputs.append(
            Paged(
                case=case,
                q=fill_random(q, seed=3 + copy),
                k_cache=caches[0],
                v_cache=caches[1],
                row_indptr=index(indptr),
                page_refs=index(own),
                cu_seqlens_q=index(bounds),
                q_positions=index(np.concatenate(positions)),
                row_window=index(
                    np.tile(np.where(case.global_heads, -1, case.window), len(case.lengths))
                ),
                row_sink=index(
                    np.tile(np.where(case.global_heads, 0, case.sink), len(case.lengths))
                ),
            )
        )
    if device == "cuda":
        inputs = [replace(paged, plan=paged.make_plan()) for paged in inputs]
    return inputs
