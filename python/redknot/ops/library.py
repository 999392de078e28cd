"""Loads ``torch.ops.redknot`` and tells torch.compile and autograd of what is in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

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
_library = torch.library.Library("redknot", "IMPL")  # registrations last as long as it does


def has_cuda_kernels() -> bool:
    """Whether the operators were built with CUDA; without it they refuse CUDA tensors by name."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "redknot::_cuda_arch", "CompositeExplicitAutograd"
    )


def fake_of(name: str) -> Callable[[_Fake], _Fake]:
    """Decorate the function that tells torch.compile what comes out of an operator."""
    _library.impl(name, _autograd_kernel(name), "Autograd", with_keyset=True)

    def register(fake: _Fake) -> _Fake:
        @functools.wraps(fake)
        def checked(*args: object, **kwargs: object) -> object:
            _check_devices(name, (*args, *kwargs.values()))
            return fake(*args, **kwargs)

        torch.library.register_fake(f"redknot::{name}", checked)
        return fake

    return register


def _check_devices(name: str, arguments: Iterable[object]) -> None:
    """Refuse a tensor on the meta device beside real ones, which would bring the fake kernel in."""
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{name}: all tensors must be on one device, got {found}")


def register_writers(*names: str) -> None:
    """Tell torch.compile of operators that only write into their arguments."""
    for name in names:
        fake_of(name)(lambda *args, **kwargs: None)


class _NoDerivative(torch.autograd.Function):
    """Runs an operator whose results cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, call: Callable[[], object], *inputs: Tensor) -> object:
        ctx.name = name
        return call()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> object:
        raise NotImplementedError(
            f"{ctx.name} has no derivative: call it under torch.no_grad() or on detached tensors"
        )


def _autograd_kernel(name: str) -> Callable[..., object]:
    """Refuse gradients by name, by the rules of torch's own operators.

    Where a gradient could be asked for, an operator that returns tensors runs and `backward` raises
    `NotImplementedError`; one that writes into arguments raises `RuntimeError` before it writes.
    Under `torch.inference_mode` the kernel is passed over.
    """
    op = getattr(torch_ops, name).default
    arguments = op._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]

    def kernel(keyset: torch._C.DispatchKeySet, *args: object, **kwargs: object) -> object:
        def call() -> object:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

        wants_gradient = torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs)
        if wants_gradient and written:
            raise RuntimeError(
                f"{name} writes to {' and '.join(written)} and has no derivative, but one of its "
                "arguments requires grad: call it under torch.no_grad() or on detached tensors"
            )
        if wants_gradient:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            return _NoDerivative.apply(name, call, *tensors)  # type: ignore[no-untyped-call]
        result = call()
        if written:  # autograd must learn that what it has kept of them is gone
            given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
            for tensor in map(given.get, written):
                if isinstance(tensor, Tensor) and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return result

    return kernel
