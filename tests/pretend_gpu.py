"""pytest plugin: GPU tests run on tensors that only say so, and kernels are the CPU's.

`pytest -p pretend_gpu -m gpu tests/test_cuda_ops.py` finds what is wrong with a test itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretend_cuda import pretend_cuda

from redknot import ops


def pytest_configure() -> None:
    torch.cuda.is_available = lambda: True
    ops.has_cuda_kernels = lambda: True
    torch.cuda.manual_seed_all = lambda seed: None


@pytest.fixture(autouse=True)
def _on_pretended_gpu() -> Iterator[None]:
    with torch.inference_mode(), pretend_cuda():
        yield
