"""A GPU that is none: tensors that say cuda:0 and compute on the CPU.

What a GPU would refuse is refused: operands on two devices, `numpy()` of a tensor on the device, an
index on the wrong one. Values are real, so whole programs run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from redknot import ops

DEVICE = torch.device("cuda:0")
FREE_BYTES = 64 << 20  # of its memory


class OnDevice(Tensor):
    """Wraps a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        self = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use .cpu() first")
        return self.held.numpy()

    def data_ptr(self) -> int:
        raise RuntimeError("the address of a tensor on cuda:0 was asked for on the host")

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"


# Ops whose purpose is to go from one device to the other.
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::to"}
_INDEXED = {"aten::index", "aten::index_put_", "aten::index_put"}


# Plain tensors in any mode: one that was made in inference mode could not be changed outside it.
@torch.inference_mode(False)
@torch.no_grad()
def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, spec = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, OnDevice)]
    theirs = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    if ours and name not in _COPIES:
        mixed = [x for x in theirs if x.dim() > 0]
        if name in _INDEXED:  # an index may be on the CPU; what is indexed, and values, may not
            mixed = [x for x in mixed if all(x is not index for index in args[1])]
        if mixed:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu"
            )
    asked = [x for x in flat if isinstance(x, torch.device)]
    on_device = asked[0].type == "cuda" if asked else bool(ours)
    if name == "aten::copy_":
        on_device = isinstance(args[0], OnDevice)
    held = {id(x.held): x for x in ours}
    plain = [x.held if isinstance(x, OnDevice) else x for x in flat]
    plain = [torch.device("cpu") if isinstance(x, torch.device) else x for x in plain]
    plain_args, plain_kwargs = tree_unflatten(plain, spec)
    plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if name in _COPIES and asked and on_device != bool(ours):
        out = out.clone()  # memory of two devices is never the same
    if not on_device:
        return out
    return tree_map_only(Tensor, lambda x: held[id(x)] if id(x) in held else OnDevice(x), out)


class PretendCuda(TorchDispatchMode):
    """Makes tensors for device cuda:0 on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def move(model: nn.Module) -> nn.Module:
    """Parameters and buffers of a model, in place."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                moved = OnDevice(tensor.detach().clone())
                is_parameter = store is module._parameters
                store[name] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return model


class _Generator(torch.Generator):
    """That of the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, device="cpu")


def lend_device_guard() -> None:
    """A torch without CUDA has no guard of its devices: lend it the one of `meta`, a no-op."""
    if torch.backends.cuda.is_built():
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    cuda, meta = 1, 14  # of c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, symbol)
    guards[cuda] = guards[meta]


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """What is made for a CUDA device inside is `OnDevice`."""
    lend_device_guard()
    with PretendCuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (FREE_BYTES, 2 * FREE_BYTES))
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(ops, "has_cuda_kernels", lambda: True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes them on the CPU, then moves
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
