"""What the machine can do, measured where the benchmark runs and before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from redknot.cache import empty_pages
from redknot.eval.bench.options import Options
from redknot.eval.bench.timing import seconds_per_call

__all__ = ["Roofs", "measure_roofs"]

_DOT_ROUNDS = 200_000
_MAX_STREAM_BYTES = 1 << 30
_STREAM_PIECE, _PAGE = (1 << 20) // 4, (16 << 10) // 4  # floats
_SAMPLES = 7


@dataclass(frozen=True)
class Roofs:
    """Best rates of the device on the benchmark's threads.

    Attributes
    ----------
    dot_tflops : float, optional
        Multiply-accumulates of the dtype on registers alone, with the vector instructions of the
        instruction set in use. None where it was not measured (CUDA).
    gemm_tflops : float
        torch's matrix product of the dtype, [1024, 4096] by [4096, 4096] (on CUDA two
        of [8192, 8192]): the library may own matrix units that vector instructions do not reach.
    stream_gbps : float
        Reading memory beyond the cache (on CUDA: copying it, bytes read and written).
    pages_gbps : float, optional
        Reading it in scattered pages of 16 KiB (64 slots of 128 dimensions in bf16):
        what decode could reach at most without arithmetic. None where it was not measured (CUDA).
    """

    dot_tflops: float | None
    gemm_tflops: float
    stream_gbps: float
    pages_gbps: float | None = None

    @property
    def compute_tflops(self) -> float:
        """The roof of kernels that multiply: dot product, on CUDA the matrix product."""
        return self.dot_tflops if self.dot_tflops is not None else self.gemm_tflops

    def fraction(self, flops: float, num_bytes: float, seconds: float) -> tuple[float, str]:
        """Share of the roofline that work of so many FLOPs and bytes reached, and its bound."""
        compute = flops / (self.compute_tflops * 1e12)
        stream = num_bytes / (self.stream_gbps * 1e9)
        bound = "compute" if compute > stream else "stream"
        return max(compute, stream) / seconds, bound

    def to_dict(self) -> dict[str, float | None]:
        """All roofs, for JSON."""
        return {
            "dot_tflops": self.dot_tflops,
            "gemm_tflops": self.gemm_tflops,
            "stream_gbps": self.stream_gbps,
            "pages_gbps": self.pages_gbps,
        }

    def __str__(self) -> str:
        dot = "" if self.dot_tflops is None else f"dot product {self.dot_tflops:.2f} TFLOP/s, "
        pages = "" if self.pages_gbps is None else f", scattered pages {self.pages_gbps:.1f} GB/s"
        return (
            f"{dot}torch matmul {self.gemm_tflops:.2f} TFLOP/s, "
            f"stream {self.stream_gbps:.1f} GB/s{pages}"
        )


def measure_roofs(options: Options) -> Roofs:
    """Measure the roofs of the options' device, dtype, instruction set and threads."""
    options.progress("roofs")
    device = options.device
    cuda = device == "cuda"
    rows, size = (8192, 8192) if cuda else (1024, 4096)
    # Zeros or ones would draw less power than numbers do, and clock higher.
    x = torch.randn(rows, size, device=device).to(options.torch_dtype)
    w = torch.randn(size, size, device=device).to(options.torch_dtype)
    gemm = 2 * x.shape[0] * w.numel() / _best(lambda: x @ w.T, device) / 1e12
    num_bytes = _MAX_STREAM_BYTES if cuda else 2 * options.rotation_bytes
    if cuda:
        data = torch.ones(num_bytes // 4, device=device)
        other = torch.empty_like(data)
        seconds = _best(lambda: other.copy_(data), device)
        return Roofs(None, gemm, 2 * num_bytes / seconds / 1e9)
    probe = torch.ones(1, dtype=options.torch_dtype)
    flops = torch.ops.redknot._cpu_dot_roof(probe, _DOT_ROUNDS)
    dot = _best(lambda: torch.ops.redknot._cpu_dot_roof(probe, _DOT_ROUNDS), device)
    data = empty_pages((num_bytes // 4,), torch.float32, "cpu").fill_(1.0)
    read = []
    for piece, scattered in ((_STREAM_PIECE, False), (_PAGE, True)):
        pieces = data[: len(data) // piece * piece].view(-1, piece)
        order = torch.randperm(len(pieces)) if scattered else torch.arange(len(pieces))
        call = partial(torch.ops.redknot._cpu_read_roof, pieces, order.int())
        read.append(pieces.nbytes / _best(call, device) / 1e9)
    return Roofs(flops / dot / 1e12, gemm, *read)


def _best(work: Callable[[], object], device: str) -> float:
    """Shortest time of a call, in seconds: a roof is what the machine can do undisturbed."""
    return min(seconds_per_call(work, 1, device) for _ in range(_SAMPLES))
