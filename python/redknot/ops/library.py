"""Loads ``torch.ops.redknot`` and says what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["fake_of", "has_cuda_kernels", "register_writers", "torch_ops"]

_Fake = TypeVar("_Fake", bound=Callable[..., object])


def _load() -> None:
    library = Path(__file__).parent.with_name("_ops.so")
    if not library.exists():
        raise ImportError(
            f"redknot's operators are not built: {library} is missing. "
            "Build them with `pip install -e . --no-build-isolation` in the repository."
        )
    torch.ops.load_library(str(library))


_load()
torch_ops = torch.ops.redknot


def has_cuda_kernels() -> bool:
    """Whether the operators were built with CUDA; without it they refuse CUDA tensors by name."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "redknot::_cuda_arch", "CompositeExplicitAutograd"
    )


def fake_of(name: str) -> Callable[[_Fake], _Fake]:
    """Decorate the function that tells torch.compile what comes out of an operator."""
    return torch.library.register_fake(f"redknot::{name}")


def register_writers(*names: str) -> None:
    """Tell torch.compile of operators that only write into their arguments."""
    for name in names:
        torch.library.register_fake(f"redknot::{name}", lambda *args, **kwargs: None)
