"""Attention over paged rows, its plan, and the union of two results."""

from __future__ import annotations

import torch
from torch import Tensor

from redknot.ops.library import fake_of, register_writers, torch_ops

__all__ = ["merge_states", "seg_paged_attention", "seg_paged_plan"]


def seg_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_indptr: Tensor,
    page_refs: Tensor,
    cu_seqlens_q: Tensor,
    q_positions: Tensor,
    row_window: Tensor,
    row_sink: Tensor,
    inv_freq: Tensor | None = None,
    rope_interleaved: bool = False,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    plan: Tensor | None = None,
    return_lse: bool = False,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of ragged rows over their pages; prefill, extension and decode in one operator.

    Query ``i`` of a row sees key ``j`` when ``j <= i and (window < 0 or j < sink or
    j > i - window)``, by true positions. Keys are used where they lie; softmax and sums are fp32 in
    a fixed order, so a result does not depend on the thread count and repeats bit by bit.

    Parameters
    ----------
    q : Tensor [num_tokens, num_q_heads, head_dim]
        Queries, rotated at their true positions. A view of a fused QKV projection is fine: only the
        last dimension must be contiguous.
    k_cache, v_cache : Tensor [num_pages, page_size, head_dim]
        The page pool, in the dtype of `q`; page and slot strides are free. ``head_dim`` is a
        multiple of 8.
    row_indptr : Tensor [num_rows + 1]
        Row ``r`` owns ``page_refs[row_indptr[r]:row_indptr[r + 1]]``.
    page_refs : Tensor [num_refs, 4]
        Page, true position of its first slot, valid slots, rotation offset: the keys of the page
        were rotated at (position - offset). Ordered by position within a row; gaps are allowed.
    cu_seqlens_q : Tensor [num_seqs + 1]
        Tokens ``cu_seqlens_q[s]:cu_seqlens_q[s + 1]`` are the queries of sequence ``s``.
    q_positions : Tensor [num_tokens]
        True positions, ascending within a sequence.
    row_window, row_sink : Tensor [num_rows]
        Reach of each row in tokens; a window of -1 means everything.
    inv_freq : Tensor [rotary_dim / 2], float32, optional
        Rotary frequencies, needed only if some rotation offset is not 0.
    rope_interleaved : bool
        Pairs are (2 d, 2 d + 1) instead of (d, d + rotary_dim / 2).
    softmax_scale : float, optional
        ``head_dim ** -0.5`` by default; on CUDA it must be positive.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)`` before the softmax; 0: no cap.
    plan : Tensor, optional
        A work list of `seg_paged_plan`; made on the fly by default.
    return_lse : bool
        Whether to return the log-sum-exp of the scaled scores.
    out, lse : Tensor, optional
        Written to instead of new tensors; `lse` only beside `out`, which overlaps no input.
    validate : bool
        Check the values of index tensors on CUDA too, with the errors of the CPU: page numbers,
        slots, order, positions. It waits for the device, so it is for debugging, and nothing that a
        CUDA graph can capture.

    Returns
    -------
    out : Tensor [num_tokens, num_q_heads, head_dim]
        Like `q`. A query that sees nothing gets zeros.
    lse : Tensor [num_q_heads, num_tokens], float32
        Natural logarithm, -inf for a query that sees nothing; empty unless asked for.

    References
    ----------
    SegPagedAttention of RedKnot, arXiv 2606.06256.
    """
    if validate and q.dim() == k_cache.dim() == 3:
        lists = (row_indptr, page_refs, cu_seqlens_q, q_positions, row_window, row_sink)
        torch_ops._check_paged_rows(
            *(x.cpu() for x in lists), q.shape[1], *k_cache.shape[:2], inv_freq is not None
        )
    if out is None:
        if lse is not None:
            raise ValueError("seg_paged_attention: lse is given without out")
        return torch_ops.seg_paged_attention(
            q, k_cache, v_cache, row_indptr, page_refs, cu_seqlens_q, q_positions, row_window,
            row_sink, inv_freq, rope_interleaved, softmax_scale, softcap, plan, return_lse,
        )  # fmt: skip
    if lse is None and return_lse:
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    torch_ops.seg_paged_attention_out(
        q, k_cache, v_cache, row_indptr, page_refs, cu_seqlens_q, q_positions, row_window,
        row_sink, inv_freq, rope_interleaved, softmax_scale, softcap, plan, out=out, lse=lse,
    )  # fmt: skip
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


def seg_paged_plan(
    row_indptr: Tensor,
    cu_seqlens_q: Tensor,
    q_positions: Tensor,
    row_window: Tensor,
    row_sink: Tensor,
    num_q_heads: int,
    page_size: int,
    num_workers: int | None = None,
) -> Tensor:
    """Work list for `seg_paged_attention`: query tiles and page splits, balanced over workers.

    A plan stays right for every call with the same `row_indptr`, `cu_seqlens_q`, `num_q_heads` and
    `page_size`: while decoding, until some row gets or loses a page. Positions, windows and sinks
    only steer the balance.

    On CUDA it is made on the device without waiting for it. Its length follows from the shapes of
    the arguments alone, so a captured graph that makes and uses it stays right when lengths change.

    Parameters
    ----------
    row_indptr, cu_seqlens_q, q_positions, row_window, row_sink : Tensor
        As for `seg_paged_attention`. On CUDA `row_indptr`, `row_window` and `row_sink` may have a
        leading dimension num_layers: the plans of all layers come from one launch.
    num_q_heads, page_size : int
        Of the call that the plan is for.
    num_workers : int, optional
        Threads to balance over, ``torch.get_num_threads()`` by default; on CUDA the grid adapts
        itself. It never changes a result.

    Returns
    -------
    Tensor [plan_length] or [num_layers, plan_length], int32
        Opaque; each layer's line is the plan of its call.
    """
    return torch_ops.seg_paged_plan(
        row_indptr, cu_seqlens_q, q_positions, row_window, row_sink, num_q_heads, page_size,
        torch.get_num_threads() if num_workers is None else num_workers,
    )  # fmt: skip


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over a union of keys, from the results over two disjoint parts of them.

    Parameters
    ----------
    out_a, out_b : Tensor [num_tokens, num_q_heads, head_dim], float32, bfloat16 or float16
        Results over either part, in one dtype; the last dimension is contiguous.
    lse_a, lse_b : Tensor [num_q_heads, num_tokens], float32
        Their log-sum-exp (natural log). -inf: no key was seen, and the result does not count.

    Returns
    -------
    out : Tensor [num_tokens, num_q_heads, head_dim]
        In the dtype of the inputs; zeros where neither part has a key.
    lse : Tensor [num_q_heads, num_tokens], float32
        Over the union.

    Notes
    -----
    Keys that both parts hold would count twice: a sink and a window that overlap are one part.
    """
    return torch_ops.merge_states(out_a, lse_a, out_b, lse_b)


@fake_of("seg_paged_attention")
def _fake_attention(
    q: Tensor, *args: object, return_lse: bool = False, **kwargs: object
) -> tuple[Tensor, Tensor]:
    wants_lse = return_lse or (len(args) == 14 and bool(args[13]))
    lse_shape = (q.shape[1], q.shape[0]) if wants_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@fake_of("seg_paged_plan")
def _fake_plan(row_indptr: Tensor, *args: object, **kwargs: object) -> Tensor:
    length = torch.library.get_ctx().new_dynamic_size()
    return row_indptr.new_empty(*row_indptr.shape[:-1], length)


@fake_of("merge_states")
def _fake_merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)


register_writers("seg_paged_attention_out")
