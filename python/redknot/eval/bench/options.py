"""What a benchmark may be told, and what it reads from the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from redknot import ops
from redknot.errors import InputError
from redknot.eval.bench.shapes import SHAPES
from redknot.recovery import ModelShape

__all__ = [
    "DEVICES",
    "DTYPES",
    "HEADS",
    "KINDS",
    "PEERS",
    "Options",
    "cache_bytes",
    "chosen_isa",
    "cuda_arch",
    "is_hopper",
    "use_threads",
]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DEVICES = ("cpu", "cuda")
KINDS = ("prefill", "decode")
HEADS = ("global", "local", "mixed")
# What can be left out: `flex` compiles for a minute, `masked` needs memory for [context, context].
PEERS = ("sdpa", "masked", "flex", "folded", "linear", "dense", "huggingface", "eager")

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_MAX_ROTATION_BYTES = 640 << 20  # a virtual machine may show the cache of a whole server
_QUICK_ROTATION_BYTES = 96 << 20


def cache_bytes() -> int:
    """Size of the largest cache that the system tells of; 32 MiB where it tells of none."""
    sizes = [32 << 20]
    for path in _CACHE.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << (10 if match[2] == "K" else 20))
    return max(sizes)


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Run torch on so many threads (0: as many as there are cores), this process on as many cores.

    Peers bring thread pools of their own, so the process is bound as a whole: threads that come
    later inherit it.
    """
    threads_before = torch.get_num_threads()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores and threads > len(cores):
        raise InputError(f"--threads must be at most {len(cores)}, the cores, got {threads}")
    threads = threads or len(cores) or threads_before
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if cores:
            os.sched_setaffinity(0, cores)


@contextmanager
def chosen_isa(isa: str) -> Iterator[None]:
    """Run the CPU kernels on an instruction set ("": the best)."""
    before = torch.ops.redknot._cpu_isa("")
    try:
        torch.ops.redknot._cpu_isa(isa)
    except RuntimeError:
        raise InputError(
            f"--isa must be default, avx2, avx512 or amx and on this machine, got {isa!r}"
        ) from None
    try:
        yield
    finally:
        torch.ops.redknot._cpu_isa(before)


def is_hopper(device: str) -> bool:
    """Whether CUDA kernels run on a GPU that has the choice between those of sm_80 and sm_90a."""
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@contextmanager
def cuda_arch(arch: str) -> Iterator[None]:
    """Run no CUDA kernels newer than "sm_80" or "sm_90a"."""
    before = torch.ops.redknot._cuda_arch("")
    torch.ops.redknot._cuda_arch(arch)
    try:
        yield
    finally:
        torch.ops.redknot._cuda_arch(before)


@dataclass(frozen=True)
class Options:
    """Which cases run, on what.

    Attributes
    ----------
    quick : bool
        Few and small cases: under a minute.
    models, contexts, batches : tuple
        Instead of the benchmark's own; empty: its own.
    kinds, heads : tuple of str
        Which cases of `attention`, from `KINDS` and `HEADS`.
    threads : int
        0: as many as the process may use.
    device, dtype, isa : str
        `isa` is the instruction set of the CPU kernels ("": the best).
    vllm_cpu : Path, optional
        vLLM's CPU extension library.
    skip_peers : tuple of str
        Peers that are left out, from `PEERS`.
    layers : int
        Layers of the slice of a model that `ttft` runs.
    progress : callable
        Called with a line about what runs next.
    """

    quick: bool = False
    models: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    kinds: tuple[str, ...] = KINDS
    heads: tuple[str, ...] = HEADS
    threads: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    isa: str = ""
    vllm_cpu: Path | None = None
    skip_peers: tuple[str, ...] = ()
    layers: int = 0
    progress: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        for what, given, known in (
            ("--model", self.models, tuple(SHAPES)),
            ("--skip-peer", self.skip_peers, PEERS),
            ("--device", (self.device,), DEVICES),
            ("--kind", self.kinds, KINDS),
            ("--heads", self.heads, HEADS),
            ("--dtype", (self.dtype,), tuple(DTYPES)),
        ):
            for value in given:
                if value not in known:
                    raise InputError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        for what, numbers, least in (
            ("--context", self.contexts, 1),
            ("--batch", self.batches, 1),
            ("--threads", (self.threads,), 0),
            ("--layers", (self.layers,), 0),
        ):
            for number in numbers:
                if number < least:
                    raise InputError(f"{what} must be at least {least}, got {number}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device")
        if self.device == "cuda" and not ops.has_cuda_kernels():
            raise InputError("--device cuda: redknot was built without CUDA; see redknot doctor")
        if self.vllm_cpu is not None and not self.vllm_cpu.is_file():
            raise InputError(f"--vllm-cpu must be vLLM's _C_*.abi3.so, got {str(self.vllm_cpu)!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return DTYPES[self.dtype]

    @property
    def rotation_bytes(self) -> int:
        """Inputs of one case together: more than the cache, so that none is found there again."""
        if self.device == "cuda":
            return 4 * torch.cuda.get_device_properties().L2_cache_size
        most = _QUICK_ROTATION_BYTES if self.quick else _MAX_ROTATION_BYTES
        return min(cache_bytes() * 5 // 4, most)

    def shapes(self, *default: str) -> dict[str, ModelShape]:
        """Named shapes to run: those asked for, else `default`."""
        return {name: SHAPES[name] for name in self.models or default}

    def wants(self, peer: str) -> bool:
        """Whether a peer of `PEERS` is to run."""
        return peer not in self.skip_peers
