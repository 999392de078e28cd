"""What attention is measured against: torch's SDPA in several forms, and FlexAttention.

On CUDA, SDPA runs with each of its backends too; one that cannot do a case fails when it is called.

A peer gets contiguous K and V, made beforehand, in the layout it likes best; it may see other keys
than our rows only where its name says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from redknot.eval.bench.options import Options
from redknot.eval.bench.paged_inputs import Case, Paged, copy_in_huge_pages

__all__ = ["Peer", "peers_of"]

_MAX_MASK_BYTES = 1 << 30
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Peer:
    """One way to do a case; `inputs` are rotated like our own.

    `to_tokens` turns its output into [num_tokens, num_q_heads, head_dim] for the comparison with
    ours; None: it computes something else, as its name says.
    """

    name: str
    work: Callable[[Any], Any]
    inputs: list[Any]
    to_tokens: Callable[[Any], Tensor] | None


def _with_backends(peer: Peer, case: Case, options: Options) -> list[Peer]:
    """The peer as torch chooses, and on CUDA with each backend of SDPA."""
    if options.device != "cuda":
        return [peer]

    def with_backend(name: str, backend: SDPBackend) -> Peer:
        def work(tensors: Any) -> Any:
            with sdpa_kernel(backend):
                return peer.work(tensors)

        return replace(peer, name=f"{peer.name}, {name}", work=work)

    # The math backend writes all scores, in fp32.
    tokens = 1 if case.kind == "decode" else max(case.lengths)
    score_bytes = 4 * len(case.lengths) * case.shape.num_q_heads * tokens * max(case.lengths)
    return [peer] + [
        with_backend(name, backend)
        for name, backend in _BACKENDS.items()
        if backend is not SDPBackend.MATH or score_bytes <= _MAX_MASK_BYTES
    ]


def peers_of(case: Case, inputs: list[Paged], options: Options) -> list[Peer]:
    """Peers that can do this case."""
    if case.kind == "decode":
        return _decode_peers(case, inputs, options)
    return _prefill_peers(case, inputs, options)


# --- prefill: one sequence from position 0 -------------------------------------------------------


def _prefill_peers(case: Case, inputs: list[Paged], options: Options) -> list[Peer]:
    if len(case.lengths) > 1:
        return []
    length = case.lengths[0]
    dense = [_prefill_tensors(paged) for paged in inputs[:4]]
    peers = []

    def causal(qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = qkv
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    if case.heads == "global" and options.wants("sdpa"):
        peers += _with_backends(Peer("SDPA causal", causal, dense, _from_bhsd), case, options)
    mask_bytes = length * length * (1 + options.torch_dtype.itemsize)
    if case.heads != "global" and options.wants("masked") and mask_bytes <= _MAX_MASK_BYTES:
        peers.append(_masked_sdpa(case, dense, length))
    if case.heads != "mixed" and options.wants("flex"):
        peers.append(_flex(case, dense, length))
    return peers


def _prefill_tensors(paged: Paged) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, num_q_heads, tokens, head_dim] and K, V like it."""
    k, v = paged.contiguous(0, np.arange(paged.case.shape.num_kv_heads))
    return paged.q.transpose(0, 1).contiguous()[None], k[None], v[None]


def _from_bhsd(out: Tensor) -> Tensor:
    return out[0].transpose(0, 1)


def _local_mask(length: int, window: int, sink: int, device: torch.device) -> Tensor:
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)
    return (j <= i) & ((j < sink) | (j > i - window))


def _masked_sdpa(case: Case, dense: list[Any], length: int) -> Peer:
    """SDPA with a boolean mask for local heads; global heads, if any, in a causal call."""
    mask = _local_mask(length, case.window, case.sink, dense[0][0].device)
    group = case.shape.group_size
    num_global = int(case.global_heads.sum())
    first_q = num_global * group
    if dense[0][0].is_cuda:  # no backend there takes a mask and grouped heads but math
        dense = [(q, *(x.repeat_interleave(group, 1) for x in kv)) for q, *kv in dense]
        num_global = first_q

    def work(qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = qkv
        local = F.scaled_dot_product_attention(
            q[:, first_q:], k[:, num_global:], v[:, num_global:], attn_mask=mask, enable_gqa=True
        )
        if not num_global:
            return local
        q, k, v = q[:, :first_q], k[:, :num_global], v[:, :num_global]
        head = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.cat([head, local], dim=1)

    return Peer("SDPA + mask", work, dense, _from_bhsd)


def _flex(case: Case, dense: list[Any], length: int) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, sink, is_global = case.window, case.sink, case.heads == "global"

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if is_global:
            return j <= i
        return (j <= i) & ((j < sink) | (j > i - window))

    mask = create_block_mask(sees, None, None, length, length, device=str(dense[0][0].device))
    # Shapes and masks of other cases would count against dynamo's limit, beyond which it is eager.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def work(qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return compiled(*qkv, block_mask=mask, enable_gqa=True)

    return Peer("FlexAttention", work, dense, _from_bhsd)


# --- decode: one query token for every sequence --------------------------------------------------


def _decode_peers(case: Case, inputs: list[Paged], options: Options) -> list[Peer]:
    shape = case.shape
    peers = []
    by_class = [np.flatnonzero(case.global_heads), np.flatnonzero(~case.global_heads)]
    classes = [heads for heads in by_class if len(heads)]
    if options.wants("folded"):
        # The fair baseline: every (sequence, KV head) is a batch entry of one head whose queries
        # are the group; one call for each run of rows of the same length.
        folded = [_folded_rows(paged, classes) for paged in inputs]

        def attend(calls: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
            return [F.scaled_dot_product_attention(q, k, v) for q, k, v in calls]

        peer = Peer("folded SDPA", attend, folded, lambda outs: _unfold(outs, case, classes))
        peers += _with_backends(peer, case, options)
    equal = len(set(case.lengths)) == 1
    if case.heads == "global" and equal and options.wants("sdpa"):
        dense = []
        for paged in inputs:
            pairs = [paged.contiguous(s, np.arange(shape.num_kv_heads))
                     for s in range(len(case.lengths))]  # fmt: skip
            k, v = (copy_in_huge_pages(torch.stack(part)) for part in zip(*pairs, strict=True))
            dense.append((paged.q[:, :, None], k, v))

        def plain(qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            return F.scaled_dot_product_attention(*qkv, enable_gqa=True)

        peers += _with_backends(Peer("SDPA", plain, dense, lambda out: out[:, :, 0]), case, options)
    return peers


def _folded_rows(paged: Paged, classes: list[np.ndarray]) -> list[tuple[Tensor, Tensor, Tensor]]:
    case = paged.case
    calls = []
    q = paged.q.unflatten(1, (case.shape.num_kv_heads, -1))  # [seqs, kv heads, group, dim]
    for length in dict.fromkeys(case.lengths):
        sequences = [s for s, own in enumerate(case.lengths) if own == length]
        for heads in classes:
            pairs = [paged.contiguous(s, heads) for s in sequences]
            k, v = (
                copy_in_huge_pages(torch.cat(part)[:, None]) for part in zip(*pairs, strict=True)
            )
            calls.append((q[sequences][:, heads].flatten(0, 1)[:, None].contiguous(), k, v))
    return calls


def _unfold(outs: list[Tensor], case: Case, classes: list[np.ndarray]) -> Tensor:
    """Outputs of `_folded_rows`' calls as [num_seqs, num_q_heads, head_dim]."""
    shape = case.shape
    out = outs[0].new_empty(len(case.lengths), shape.num_kv_heads, shape.group_size, shape.head_dim)
    remaining = iter(outs)
    for length in dict.fromkeys(case.lengths):
        sequences = [s for s, own in enumerate(case.lengths) if own == length]
        for heads in classes:
            part = next(remaining)[:, 0].unflatten(0, (len(sequences), len(heads)))
            for row, sequence in enumerate(sequences):
                out[sequence, heads] = part[row]
    return out.flatten(1, 2)
