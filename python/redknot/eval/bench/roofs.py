"""What the machine can do, measured where the benchmark runs and before it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from redknot.eval.bench.options import Options

__all__ = ["Roofs", "measure_roofs"]

_DOT_ROUNDS = 200_000
_MAX_STREAM_BYTES = 1 << 30
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
        torch's matrix product of the dtype, [1024, 4096] by [4096, 4096]: the library may own
        matrix units that vector instructions do not reach.
    stream_gbps : float
        Reading memory beyond the cache (on CUDA: copying it, bytes read and written).
    """

    dot_tflops: float | None
    gemm_tflops: float
    stream_gbps: float

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
        }

    def __str__(self) -> str:
        dot = "" if self.dot_tflops is None else f"dot product {self.dot_tflops:.2f} TFLOP/s, "
        return (
            f"{dot}torch matmul {self.gemm_tflops:.2f} TFLOP/s, stream {self.stream_gbps:.1f} GB/s"
        )


def measure_roofs(options: Options) -> Roofs:
    """Measure the roofs of the options' device, dtype, instruction set and threads."""
    options.progress("roofs")
    cuda = options.device == "cuda"
    x = torch.ones(1024, 4096, dtype=options.torch_dtype, device=options.device)
    w = torch.ones(4096, 4096, dtype=options.torch_dtype, device=options.device)
    gemm = 2 * x.shape[0] * w.numel() / _best(lambda: x @ w.T, cuda) / 1e12
    num_bytes = _MAX_STREAM_BYTES if cuda else 2 * options.rotation_bytes
    data = torch.ones(num_bytes // 4, device=options.device)
    if cuda:
        other = torch.empty_like(data)
        seconds = _best(lambda: other.copy_(data), cuda)
        return Roofs(None, gemm, 2 * num_bytes / seconds / 1e9)
    probe = torch.ones(1, dtype=options.torch_dtype)
    flops = torch.ops.redknot._cpu_dot_roof(probe, _DOT_ROUNDS)
    dot = _best(lambda: torch.ops.redknot._cpu_dot_roof(probe, _DOT_ROUNDS), cuda)
    stream = _best(lambda: torch.ops.redknot._cpu_read_roof(data), cuda)
    return Roofs(flops / dot / 1e12, gemm, num_bytes / stream / 1e9)


def _best(work: object, cuda: bool) -> float:
    """Shortest time of a call, in seconds: a roof is what the machine can do undisturbed."""
    assert callable(work)
    best = float("inf")
    for _ in range(_SAMPLES):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
