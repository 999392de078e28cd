"""SegPagedAttention of one layer: prefill and decode; global, local (sink + window) and mixed rows.

Useful FLOPs and bytes are those of visible keys alone. Every peer that computes the same is
compared with our output before it is timed; one that cannot do a case is named with its reason.
Decode on the CPU is also held against reading its pages and doing nothing with them.
On CUDA the plan is made beforehand, as an engine makes it once for all layers, and timed by itself.
On Hopper, which has kernels of its own, those for GPUs before it are one of the peers.
"""

from __future__ import annotations

import sys

import torch

from redknot.eval.bench.attention_peers import Peer, peers_of
from redknot.eval.bench.options import Options, cuda_arch, is_hopper
from redknot.eval.bench.paged_inputs import Case, Paged, build
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row, measure_row
from redknot.eval.bench.timing import measure, rotating
from redknot.eval.bench.vllm_cpu import vllm_peers
from redknot.recovery import ModelShape

__all__ = ["cases", "run"]

# Of one case; peers hold a copy each. 8 x 32K of Llama-3-8B: 1 GiB of K and V, and queries.
_MAX_CASE_BYTES = 9 << 27
_MIN_COSINE = 0.999

_FULL = {"prefill": (1024, 4096, 8192, 16384), "decode": (1024, 8192, 32768, 65536)}
_QUICK = {"prefill": (2048,), "decode": (8192,)}
# What keeps a GPU busy: there, `quick` is about a minute too.
_QUICK_CUDA = {"prefill": (4096, 16384), "decode": (8192, 32768)}


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Measure every case."""
    return [_measure(name, case, options, roofs) for name, case in cases(options)]


def cases(options: Options) -> list[tuple[str, Case]]:
    """(shape's name, case); models whose attention has the same shape share one."""
    named: dict[tuple[int, int, int], tuple[list[str], ModelShape]] = {}
    default = ("Llama-3-8B",) if options.quick else (
        "Mistral-7B", "Llama-3-8B", "Qwen3-32B", "Llama-3.3-70B")  # fmt: skip
    for name, shape in options.shapes(*default).items():
        key = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        named.setdefault(key, ([], shape))[0].append(name)
    cuda = options.device == "cuda"
    contexts = (_QUICK_CUDA if cuda else _QUICK) if options.quick else _FULL
    batches = options.batches or (((1, 16) if cuda else (1,)) if options.quick else (1, 8, 32))
    found = []
    for names, shape in named.values():
        for kind in options.kinds:
            for context in options.contexts or contexts[kind]:
                mixes = [(context,) * batch for batch in (batches if kind == "decode" else (1,))]
                if kind == "decode" and 32 in batches:
                    mixes.append(long_tailed(context))
                for lengths in mixes:
                    for heads in options.heads:
                        case = Case(shape, kind, heads, lengths)
                        if case.num_bytes(options.torch_dtype.itemsize) <= _MAX_CASE_BYTES:
                            found.append((", ".join(names), case))
    return found


def long_tailed(context: int) -> tuple[int, ...]:
    """32 sequences: half of them a sixteenth of `context`, two of them all of it."""
    counts = ((16, 16), (8, 8), (4, 4), (2, 2), (2, 1))  # how many, divisor
    return tuple(max(context // d, 1) for n, d in counts for _ in range(n))


def _shape_text(case: Case) -> str:
    lengths = set(case.lengths)
    longest = max(case.lengths)
    size = f"{longest // 1024}K" if longest % 1024 == 0 else str(longest)
    batch = f"{len(case.lengths)} x " if case.kind == "decode" else ""
    tail = ", long tail" if len(lengths) > 1 else ""
    shape = case.shape
    return f"{shape.num_q_heads}/{shape.num_kv_heads}x{shape.head_dim} {batch}{size}{tail}"


def _measure(name: str, case: Case, options: Options, roofs: Roofs) -> Row:
    options.progress(f"{case.kind} {case.heads} {_shape_text(case)}: inputs")
    inputs = build(case, options)
    peers = peers_of(case, inputs, options) + vllm_peers(case, inputs, options)
    if case.kind == "decode" and options.device == "cpu":
        peers.append(Peer("bare reading", _read_pages, inputs, to_tokens=None))
    if case.heads == "mixed":
        everything = Case(case.shape, case.kind, "global", case.lengths)
        peers.append(
            Peer("redknot, all global", Paged.attend, build(everything, options), to_tokens=None)
        )
    if is_hopper(options.device):
        peers.append(Peer("redknot on sm_80", _attend_on_sm_80, inputs, to_tokens=lambda out: out))
    missing = {}
    for peer in peers:
        reason = _check(peer, inputs[0])
        if reason:
            missing[peer.name] = reason
            print(f"{case.kind} {case.heads} {_shape_text(case)}: no {peer.name}: {reason}",
                  file=sys.stderr)  # fmt: skip
    peers = [peer for peer in peers if peer.name not in missing]
    itemsize = options.torch_dtype.itemsize
    dense = Case(case.shape, case.kind, "global", case.lengths)
    return measure_row(
        options,
        roofs,
        rotating(Paged.attend, inputs),
        {peer.name: rotating(peer.work, peer.inputs) for peer in peers},
        kind=case.kind,
        heads=case.heads,
        shape=_shape_text(case),
        flops=case.flops,
        num_bytes=case.num_bytes(itemsize),
        details={
            "model": name,
            "lengths": sorted(set(case.lengths)),
            "batch": len(case.lengths),
            "window": case.window,
            "sink": case.sink,
            "page_size": case.page_size,
            "global_rows": f"{int(case.global_heads.sum())}/{len(case.global_heads)}",
            "inputs_rotated": len(inputs),
            "all_global_bytes_ratio": dense.num_bytes(itemsize) / case.num_bytes(itemsize),
            "all_global_flops_ratio": dense.flops / case.flops,
            "peers_missing": missing,
            **_plan_time(inputs, options),
        },
    )


def _read_pages(paged: Paged) -> None:
    """Read the pages of a call and nothing else: what bounds decode, in the same turns."""
    pages = paged.page_refs[:, 0].contiguous()
    for cache in (paged.k_cache, paged.v_cache):
        torch.ops.redknot._cpu_read_roof(cache.flatten(1).view(torch.float32), pages)


def _attend_on_sm_80(paged: Paged) -> torch.Tensor:
    """The kernels that all GPUs before Hopper run."""
    with cuda_arch("sm_80"):
        return paged.attend()


def _plan_time(inputs: list[Paged], options: Options) -> dict[str, float]:
    """Time of the plan that `attend` was given, which is then not in the row's time."""
    if inputs[0].plan is None:
        return {}
    timing = measure({"": rotating(Paged.make_plan, inputs)}, seconds=0.05, device=options.device)[
        ""
    ]
    return {"plan_ms": 1e3 * timing.median}


def _check(peer: Peer, paged: Paged) -> str:
    """Why a peer cannot do the case, "" if it can; refuse to compare times of different results."""
    if peer.to_tokens is None:
        return ""
    try:
        theirs = peer.to_tokens(peer.work(peer.inputs[0])).float().flatten()
    except (NotImplementedError, RuntimeError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    ours = paged.attend().float().flatten()
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    if not cosine > _MIN_COSINE:
        raise RuntimeError(
            f"{peer.name} and redknot differ (cosine {cosine:.5f}) on {paged.case.kind} "
            f"{paged.case.heads} {_shape_text(paged.case)}"
        )
    return ""
