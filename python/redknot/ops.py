"""The operators of redknot: typed wrappers around ``torch.ops.redknot``.

Everything here works on CPU tensors in float32, bfloat16 and float16, under ``torch.compile`` and
with fake tensors. With CUDA in the build, `seg_paged_attention` (bfloat16 and float16; head_dim 32,
64, 128 or 256; pages of a multiple of 8 up to 256), `seg_paged_plan`, `write_pages`, `copy_pages`,
`rope_realign`, `token_importance`, `select_tokens` and `merge_states` take CUDA tensors too; they
never wait for the device, so the *values* of index tensors are trusted there (`validate` of
`seg_paged_attention` checks them). Wrong arguments raise ``RuntimeError`` with a message that names
the operator, the argument, the rule and what arrived.
Index tensors are int32 unless said. A *row* is one KV head of one sequence:
``row = seq * num_kv_heads + kv_head``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "copy_pages",
    "gathered_ffn",
    "gathered_linear",
    "merge_states",
    "rms_norm",
    "rope_realign",
    "rope_realign_pages",
    "seg_paged_attention",
    "seg_paged_plan",
    "select_tokens",
    "token_importance",
    "write_pages",
]


def _load() -> None:
    library = Path(__file__).with_name("_ops.so")
    if not library.exists():
        raise ImportError(
            f"redknot's operators are not built: {library} is missing. "
            "Build them with `pip install -e . --no-build-isolation` in the repository."
        )
    torch.ops.load_library(str(library))


_load()
_ops = torch.ops.redknot


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
        Written to instead of new tensors; `lse` only beside `out`.
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
        _ops._check_paged_rows(
            *(x.cpu() for x in lists), q.shape[1], *k_cache.shape[:2], inv_freq is not None
        )
    if out is None:
        if lse is not None:
            raise ValueError("seg_paged_attention: lse is given without out")
        return _ops.seg_paged_attention(
            q, k_cache, v_cache, row_indptr, page_refs, cu_seqlens_q, q_positions, row_window,
            row_sink, inv_freq, rope_interleaved, softmax_scale, softcap, plan, return_lse,
        )  # fmt: skip
    if lse is None and return_lse:
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    _ops.seg_paged_attention_out(
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
    return _ops.seg_paged_plan(
        row_indptr, cu_seqlens_q, q_positions, row_window, row_sink, num_q_heads, page_size,
        torch.get_num_threads() if num_workers is None else num_workers,
    )  # fmt: skip


def write_pages(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write the keys and values of tokens to slots of the page pool, in place.

    Parameters
    ----------
    k, v : Tensor [num_tokens, num_kv_heads, head_dim]
        In the dtype of the pool; only the last dimension must be contiguous.
    k_cache, v_cache : Tensor [num_pages, page_size, head_dim]
        The page pool, written to.
    slots : Tensor [num_tokens, num_kv_heads], int64
        ``page * page_size + slot``, or -1 to skip. Slots are distinct.
    """
    _ops.write_pages(k, v, k_cache, v_cache, slots)


def copy_pages(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
    """Copy whole pages of the pool, K and V, in place: the copies of copy on write.

    Parameters
    ----------
    k_cache, v_cache : Tensor [num_pages, page_size, head_dim]
        The page pool, written to.
    copies : Tensor [num_copies, 2]
        Source and destination pages. A destination occurs once and is no source.
    """
    _ops.copy_pages(k_cache, v_cache, copies)


def rope_realign(
    k: Tensor,
    offset: int | Tensor,
    inv_freq: Tensor,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Move rotated keys by `offset` positions: one rotation by the difference, one rounding.

    Angles are fp32 products of offset and frequency. ``attention_scaling`` of scaled rotary
    embeddings is already in the keys and is not applied again.

    Parameters
    ----------
    k : Tensor [num_tokens, num_heads, head_dim]
        Rotated keys; only the last dimension must be contiguous.
    offset : int or Tensor [num_tokens], int32
        Positions to move by, for all tokens or for each.
    inv_freq : Tensor [rotary_dim / 2], float32
        Position-independent frequencies; the first ``rotary_dim`` dimensions turn.
    interleaved : bool
        Pairs are (2 d, 2 d + 1) instead of (d, d + rotary_dim / 2).
    out : Tensor, optional
        Written to instead of a new tensor; may be `k` itself.

    Returns
    -------
    Tensor [num_tokens, num_heads, head_dim]
        The moved keys; `out` if given.
    """
    offsets = offset if isinstance(offset, Tensor) else None
    by = 0 if isinstance(offset, Tensor) else offset
    if out is None:
        return _ops.rope_realign(k, by, inv_freq, interleaved, offsets=offsets)
    _ops.rope_realign_out(k, by, inv_freq, interleaved, offsets=offsets, out=out)
    return out


def rope_realign_pages(
    k_cache: Tensor, page_refs: Tensor, inv_freq: Tensor, interleaved: bool = False
) -> None:
    """Turn the valid keys of pages by their rotation offset, in place; the offset is then 0.

    Parameters
    ----------
    k_cache : Tensor [num_pages, page_size, head_dim]
        Written to.
    page_refs : Tensor [num_refs, 4]
        As for `seg_paged_attention`; each page occurs once, its first position is not looked at.
    inv_freq, interleaved
        As for `rope_realign`.
    """
    _ops.rope_realign_pages(k_cache, page_refs, inv_freq, interleaved)


def token_importance(attn_out: Tensor) -> Tensor:
    """L2 norm of each token's attention output over all heads, before the output projection.

    Parameters
    ----------
    attn_out : Tensor [num_tokens, num_q_heads, head_dim]
        Only the last dimension must be contiguous.

    Returns
    -------
    Tensor [num_tokens], float32
    """
    return _ops.token_importance(attn_out)


def select_tokens(
    importance: Tensor, cu_seqlens: Tensor, mass: float, recent_n: int = 0, min_keep: int = 0
) -> tuple[Tensor, Tensor]:
    """Pick, per sequence, the smallest set of tokens that holds `mass` of the importance.

    The token that crosses the threshold is included, ties go to the lower index, and
    ``mass >= 1`` keeps all. The last `recent_n` tokens are kept besides, and then more by
    importance until `min_keep` are.

    Parameters
    ----------
    importance : Tensor [num_tokens], float32
        Finite and not negative.
    cu_seqlens : Tensor [num_seqs + 1]
        Bounds of the sequences.
    mass : float
        Fraction of each sequence's sum.
    recent_n, min_keep : int
        Tokens per sequence.

    Returns
    -------
    indices : Tensor [num_tokens], int32
        Kept tokens in ascending order, then -1.
    count : Tensor [1], int32
        How many are kept; on the device, so that nothing waits for it.
    """
    return _ops.select_tokens(importance, cu_seqlens, mass, recent_n, min_keep)


def gathered_ffn(
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    w_gate_up: Tensor,
    w_down: Tensor,
    indices: Tensor,
    count: Tensor,
    activation: str = "silu",
    *,
    w_up: Tensor | None = None,
) -> None:
    """Gated FFN of selected tokens, added to the residual stream in place.

    ``residual[i] += w_down @ (activation(gate(x)) * up(x))`` with ``x = rmsnorm(residual[i])`` for
    the `count` listed tokens; all others keep their bits.

    Parameters
    ----------
    residual : Tensor [num_tokens, hidden_dim]
        Read and written to.
    norm_weight : Tensor [hidden_dim]
        Of the RMS norm (fp32 variance, rounded to the dtype before the product).
    eps : float
        Of the RMS norm.
    w_gate_up : Tensor [2 * ffn_dim, hidden_dim]
        Gate above up; or the gate alone [ffn_dim, hidden_dim] beside `w_up`.
    w_down : Tensor [hidden_dim, ffn_dim]
    indices : Tensor [max_rows], int32
        The first `count` entries are distinct token rows.
    count : Tensor [1], int32
    activation : str
        ``"silu"``, or ``"gelu_tanh"`` (GELU by tanh).
    w_up : Tensor [ffn_dim, hidden_dim], optional
        The up projection, when it is not packed behind the gate.

    Notes
    -----
    On CUDA `count` is only read by the kernels, so that a captured graph follows it. There the
    dtype is bfloat16 or float16, dimensions and strides are multiples of 8; indices that are no
    rows are skipped, and of one that occurs twice the result is undefined. Sums are in a fixed
    order.
    """
    _ops.gathered_ffn(
        residual, norm_weight, eps, w_gate_up, w_down, indices, count, activation, w_up=w_up
    )


def gathered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    indices: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Linear layer of selected rows, normed on the way if wanted.

    ``out[i] = weight @ x[indices[i]] + bias`` for ``i < count``. Up to 64 rows cost no more than
    reading the weights once.

    Parameters
    ----------
    x : Tensor [num_tokens, in_dim]
        Only the last dimension must be contiguous.
    weight : Tensor [out_dim, in_dim]
        Of a ``torch.nn.Linear``, or some rows of it.
    bias : Tensor [out_dim], optional
    norm_weight : Tensor [in_dim], optional
        The rows are RMS-normed first, as `rms_norm` does.
    eps : float
        Of the norm.
    indices : Tensor [max_rows], int32, optional
        The first `count` entries are rows of `x`; None: all rows in order.
    count : Tensor [1], int32
        With `indices`.

    Returns
    -------
    Tensor [max_rows, out_dim]
        What is behind the first `count` rows means nothing.

    Notes
    -----
    On CUDA as for `gathered_ffn`: `count` stays there, the dtype is bfloat16 or float16, dimensions
    and strides are multiples of 8, and the values of `indices` are trusted.
    """
    return _ops.gathered_linear(
        x, weight, bias, norm_weight=norm_weight, eps=eps, indices=indices, count=count
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of every row, rounded as Hugging Face's modules round.

    Parameters
    ----------
    x : Tensor [num_rows, hidden_dim]
        Only the last dimension must be contiguous.
    weight : Tensor [hidden_dim]
    eps : float

    Returns
    -------
    Tensor [num_rows, hidden_dim]
        ``round(x / rms) * weight`` with an fp32 variance; contiguous.
    """
    return _ops.rms_norm(x, weight, eps)


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
    return _ops.merge_states(out_a, lse_a, out_b, lse_b)


# --- fake implementations: what torch.compile needs to know ---------------------------------------


def _fake_attention(
    q: Tensor, *args: object, return_lse: bool = False, **kwargs: object
) -> tuple[Tensor, Tensor]:
    wants_lse = return_lse or (len(args) == 14 and bool(args[13]))
    lse_shape = (q.shape[1], q.shape[0]) if wants_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_plan(row_indptr: Tensor, *args: object, **kwargs: object) -> Tensor:
    length = torch.library.get_ctx().new_dynamic_size()
    return row_indptr.new_empty(*row_indptr.shape[:-1], length)


def _fake_rope_realign(k: Tensor, *args: object, **kwargs: object) -> Tensor:
    return k.new_empty(k.shape)


def _fake_token_importance(attn_out: Tensor) -> Tensor:
    return attn_out.new_empty(attn_out.shape[0], dtype=torch.float32)


def _fake_select_tokens(
    importance: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return (
        importance.new_empty(importance.shape, dtype=torch.int32),
        importance.new_empty(1, dtype=torch.int32),
    )


def _fake_gathered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    return x.new_empty(len(x if indices is None else indices), len(weight))


def _fake_rms_norm(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)


def _fake_in_place(*args: object, **kwargs: object) -> None:
    """Nothing to say: these operators only write into their arguments."""


_FAKES: dict[str, Callable[..., object]] = {
    "seg_paged_attention": _fake_attention,
    "seg_paged_attention_out": _fake_in_place,
    "seg_paged_plan": _fake_plan,
    "write_pages": _fake_in_place,
    "copy_pages": _fake_in_place,
    "rope_realign": _fake_rope_realign,
    "rope_realign_out": _fake_in_place,
    "rope_realign_pages": _fake_in_place,
    "token_importance": _fake_token_importance,
    "select_tokens": _fake_select_tokens,
    "gathered_ffn": _fake_in_place,
    "gathered_linear": _fake_gathered_linear,
    "rms_norm": _fake_rms_norm,
    "merge_states": _fake_merge_states,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"redknot::{_name}", _fake)
