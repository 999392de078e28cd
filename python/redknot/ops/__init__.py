"""The operators of redknot: typed wrappers around ``torch.ops.redknot``.

Everything here works on CPU tensors in float32, bfloat16 and float16, under ``torch.compile`` and
with fake tensors. With CUDA in the build (`has_cuda_kernels`) CUDA tensors are taken too:
attention, FFN and linear layers in bfloat16 and float16, attention with head_dim 32, 64, 128 or
256 and pages of a multiple of 8 up to 256. Nothing waits for the device, so the *values* of index
tensors are trusted there (`validate` of `seg_paged_attention` checks them).

Nothing has a derivative: `backward` through a result raises ``NotImplementedError``, and an
operator that writes into its arguments refuses those that require grad. ``torch.inference_mode``
saves each call the microseconds in which this is looked at.

Wrong arguments raise ``RuntimeError`` with a message that names the operator, the argument, the
rule and what arrived. Index tensors are int32 unless said. A *row* is one KV head of one
sequence: ``row = seq * num_kv_heads + kv_head``.
"""

from __future__ import annotations

from redknot.ops.attention import merge_states, seg_paged_attention, seg_paged_plan
from redknot.ops.ffn import gathered_ffn, gathered_linear, rms_norm
from redknot.ops.library import has_cuda_kernels
from redknot.ops.pages import copy_pages, write_pages
from redknot.ops.rope import rope_realign, rope_realign_pages
from redknot.ops.selection import select_tokens, token_importance

__all__ = [
    "copy_pages",
    "gathered_ffn",
    "gathered_linear",
    "has_cuda_kernels",
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
