"""The bodies of the GPU tests run without one: tensors only say so, kernels are the CPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What only a GPU has: streams and graphs, layers in one plan, values that are trusted, dtypes and
# shapes without a kernel, two kernels for one op; and a single key, which bf16 weights on AMX tiles
# reproduce but roughly.
ONLY_ON_A_GPU = (
    "current_stream", "captured", "two_devices", "all_layers", "no_kernel", "do_not_exist",
    "small_errors", "window_of_one", "both_architectures",
)  # fmt: skip


def test_bodies_of_gpu_tests_are_right() -> None:
    files = [str(HERE / f"test_cuda_{topic}.py") for topic in ("ops", "attention", "select", "ffn")]
    chosen = f"small and not ({' or '.join(ONLY_ON_A_GPU)})"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-m", "gpu", "-k", chosen, *files],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "python"), str(HERE)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
