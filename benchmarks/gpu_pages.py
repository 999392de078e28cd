"""Bandwidth of the page and rotation ops on one GPU, beside a plain copy measured in the same run.

    python benchmarks/gpu_pages.py [--json FILE]

Bytes are counted once read and once written, index tensors aside. Every case moves more than any
L2 cache holds. Times are medians of single calls between CUDA events.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import redknot.ops  # noqa: F401 (registers torch.ops.redknot)

# Llama-3-8B and Qwen3-32B: 8 KV heads of 128.
NUM_KV_HEADS, HEAD_DIM = 8, 128
NUM_TOKENS = 131072
WARM_UP, REPEATS = 5, 50


@dataclass
class Result:
    """One line of the table."""

    case: str
    elapsed_us: float
    gigabytes_per_second: float
    percent_of_copy: float


def measure(call: Callable[[], object]) -> float:
    """Median time of one call, in microseconds."""
    times = []
    for i in range(WARM_UP + REPEATS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= WARM_UP:
            times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def measure_copy() -> tuple[float, float]:
    """The peer: time in microseconds and GB/s of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    elapsed_us = measure(lambda: target.copy_(source))
    return elapsed_us, 2 * source.numel() / elapsed_us / 1e3


def page_pool(page_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Half of a pool, K or V; twice as many slots as the tokens that a case moves."""
    num_pages = 2 * NUM_TOKENS * NUM_KV_HEADS // page_size
    return torch.randn(num_pages, page_size, HEAD_DIM, device="cuda").to(dtype)


def cases(dtype: torch.dtype) -> list[tuple[str, int, Callable[[], object]]]:
    """Name, bytes moved and call of every case."""
    ops = torch.ops.redknot
    shape = (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    tensor_bytes = NUM_TOKENS * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    k, v = torch.randn(2, *shape, device="cuda").to(dtype)
    inv_freq = 500000.0 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
    offsets = torch.randint(1, 100000, (NUM_TOKENS,), dtype=torch.int32, device="cuda")
    name = str(dtype).removeprefix("torch.")
    out = torch.empty_like(k)
    found: list[tuple[str, int, Callable[[], object]]] = [
        (
            f"rope_realign {name} one offset",
            2 * tensor_bytes,
            lambda: ops.rope_realign_out(k, 1234, inv_freq, out=out),
        ),
        (
            f"rope_realign {name} offset per token",
            2 * tensor_bytes,
            lambda: ops.rope_realign_out(k, 0, inv_freq, offsets=offsets, out=out),
        ),
    ]
    for page_size in (16, 64):
        k_cache, v_cache = page_pool(page_size, dtype), page_pool(page_size, dtype)
        num_pages = k_cache.shape[0]
        order = torch.randperm(num_pages, device="cuda", dtype=torch.int32)
        # Whole pages of neighbouring tokens, pages anywhere: how an engine writes a prompt.
        slots = (
            order[: num_pages // 2].long()[:, None] * page_size
            + torch.arange(page_size, device="cuda")
        ).view(NUM_KV_HEADS, NUM_TOKENS)
        slots = slots.T.contiguous()
        copies = order.view(-1, 2).contiguous()
        refs = torch.zeros(num_pages // 2, 4, dtype=torch.int32, device="cuda")
        refs[:, 0] = order[: num_pages // 2]
        refs[:, 2] = page_size
        refs[:, 3] = 77
        suffix = f"{name} page_size {page_size}"
        found += [
            (
                f"write_pages {suffix}",
                4 * tensor_bytes,
                lambda kc=k_cache, vc=v_cache, s=slots: ops.write_pages(k, v, kc, vc, s),
            ),
            (
                f"copy_pages {suffix}",
                4 * tensor_bytes,
                lambda kc=k_cache, vc=v_cache, c=copies: ops.copy_pages(kc, vc, c),
            ),
            (
                f"rope_realign_pages {suffix}",
                2 * tensor_bytes,
                lambda kc=k_cache, r=refs: ops.rope_realign_pages(kc, r, inv_freq),
            ),
        ]
    return found


def main() -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    copy_us, copy_gbs = measure_copy()
    results = [Result("copy of 1 GiB, device to device", copy_us, copy_gbs, 100.0)]
    for dtype in (torch.bfloat16, torch.float32):
        for case, num_bytes, call in cases(dtype):
            elapsed_us = measure(call)
            rate = num_bytes / elapsed_us / 1e3
            results.append(Result(case, elapsed_us, rate, 100 * rate / copy_gbs))

    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"{NUM_TOKENS} tokens, {NUM_KV_HEADS} KV heads of {HEAD_DIM}; median of {REPEATS}")
    for r in results:
        print(
            f"{r.case:44} {r.elapsed_us:9.1f} us {r.gigabytes_per_second:8.0f} GB/s "
            f"{r.percent_of_copy:6.1f} % of copy"
        )
    if arguments.json:
        report = {
            "device": device,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "num_tokens": NUM_TOKENS,
            "num_kv_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
