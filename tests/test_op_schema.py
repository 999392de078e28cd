"""What torch must know of each operator: schema, aliasing, fake results, compilation, loading."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paged_case import paged_rows
from pretend_cuda import lend_device_guard
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from redknot import ops

RAW = torch.ops.redknot


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_args() -> tuple[Tensor, ...]:
    return paged_rows(
        [[(0, 20, 0)], [(0, 20, 0)]], [range(15, 20)], group=2, window=[-1, 8], sink=[0, 2]
    ).args()


def pool() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 8, 16), torch.randn(4, 8, 16)


def inv_freq() -> Tensor:
    return 1e4 ** (-torch.arange(0, 16, 2) / 16)


def plan_args() -> tuple[object, ...]:
    _, _, _, row_indptr, _, *rest = attention_args()
    return (row_indptr, *rest, 4, 16, 2)


# Operator, arguments, keyword arguments.
Case = tuple[Callable[..., object], tuple[object, ...], dict[str, object]]


def cases() -> dict[str, Case]:
    q, *paged = attention_args()
    k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    refs = torch.tensor([[1, 0, 8, 5], [3, 8, 2, -5]], dtype=torch.int32)
    ffn = (torch.randn(6, 16), torch.ones(16), 1e-6, torch.randn(48, 16), torch.randn(16, 24),
           int32(1, 4), int32(2))  # fmt: skip
    return {
        "seg_paged_attention": (RAW.seg_paged_attention, (q, *paged), {}),
        "seg_paged_attention_lse": (RAW.seg_paged_attention, (q, *paged), {"return_lse": True}),
        "seg_paged_attention_out": (
            RAW.seg_paged_attention_out,
            (q, *paged),
            {"out": torch.empty_like(q), "lse": torch.empty(4, 5)},
        ),
        "seg_paged_plan": (RAW.seg_paged_plan, plan_args(), {}),
        "write_pages": (RAW.write_pages, (k, v, *pool(), torch.arange(6).reshape(3, 2)), {}),
        "copy_pages": (RAW.copy_pages, (*pool(), torch.tensor([[0, 2]]).int()), {}),
        "rope_realign": (RAW.rope_realign, (k, 3, inv_freq()), {}),
        "rope_realign_offsets": (RAW.rope_realign, (k, 0, inv_freq()), {"offsets": int32(1, 2, 3)}),
        "rope_realign_out": (
            RAW.rope_realign_out, (k, 3, inv_freq()), {"out": torch.empty_like(k)},
        ),
        "rope_realign_pages": (RAW.rope_realign_pages, (pool()[0], refs, inv_freq()), {}),
        "token_importance": (RAW.token_importance, (k,), {}),
        "select_tokens": (RAW.select_tokens, (torch.rand(7), int32(0, 3, 7), 0.5, 1, 1), {}),
        "gathered_ffn": (RAW.gathered_ffn, ffn, {}),
        "gathered_linear": (RAW.gathered_linear, (torch.randn(5, 16), torch.randn(8, 16)), {}),
        "gathered_linear_rows": (
            RAW.gathered_linear,
            (torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)),
            {"norm_weight": torch.ones(16), "eps": 1e-6, "indices": int32(4, 1, 0),
             "count": int32(2)},
        ),
        "rms_norm": (RAW.rms_norm, (torch.randn(3, 16), torch.randn(16), 1e-6), {}),
        "merge_states": (RAW.merge_states, (k, torch.randn(2, 3), 2 * k, torch.randn(2, 3)), {}),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str) -> None:
    op, args, kwargs = cases()[name]
    torch.library.opcheck(op.default, args, kwargs)


def test_every_operator_is_covered() -> None:
    covered = {str(op.default.name()).split("::")[1] for op, _, _ in cases().values()}
    schemas = {
        s.name.split("::")[1]
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("redknot")
    }
    # No tensors come out of them.
    tools = {"_check_paged_rows", "_cpu_isa", "_cuda_arch", "_cpu_dot_roof", "_cpu_read_roof"}
    assert schemas - covered == tools


def clones(args: tuple[object, ...]) -> list[object]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


@pytest.mark.parametrize("name", cases())
def test_compiles_without_a_break(name: str) -> None:
    op, args, kwargs = cases()[name]

    def call(*args: object) -> object:
        return op(*args, **kwargs), *args

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        got, want = compiled(*clones(args)), call(*clones(args))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def asking_for_gradients(name: str) -> Case:
    return tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), cases()[name])


WRITERS = {n for n, (op, _, _) in cases().items() if not op.default._schema.returns}


@pytest.mark.parametrize("name", sorted(cases().keys() - WRITERS))
def test_backward_through_an_operator_is_refused_by_name(name: str) -> None:
    op, args, kwargs = asking_for_gradients(name)
    for result in tree_leaves(op(*args, **kwargs)):
        assert result.requires_grad == result.is_floating_point()
        if result.requires_grad:
            with pytest.raises(NotImplementedError, match=f"^{op.__name__} has no derivative: "):
                result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not any(result.requires_grad for result in tree_leaves(op(*args, **kwargs)))


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_an_operator_that_writes_refuses_gradients_before_it_writes(name: str) -> None:
    op, args, kwargs = asking_for_gradients(name)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    before = [(t.detach().clone(), t._version) for t in tensors]
    with pytest.raises(RuntimeError, match=f"^{op.__name__} writes to .* has no derivative, but "):
        op(*args, **kwargs)
    for tensor, (values, version) in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor.detach(), values, rtol=0, atol=0, equal_nan=True)
        assert tensor._version == version
    with torch.no_grad():
        op(*args, **kwargs)


def test_autograd_notices_that_a_tensor_it_kept_was_written_to() -> None:
    weight = torch.ones(6, 16, requires_grad=True)
    op, (residual, *rest), _ = cases()["gathered_ffn"]
    product = residual * weight  # keeps the residual
    op(residual, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_tensor_on_the_meta_device_beside_real_ones_is_refused() -> None:
    """The fake kernel would answer with memory that nobody has written."""
    op, (x, weight, eps), _ = cases()["rms_norm"]
    message = "rms_norm: all tensors must be on one device, got cpu and meta"
    for args in ((x.to("meta"), weight), (x, weight.to("meta"))):
        with pytest.raises(RuntimeError, match=message):
            op(*args, eps)


@pytest.mark.slow
def test_a_layer_through_inductor() -> None:
    """Write the new token's KV, attend, rank the tokens: compiled and eager agree bit by bit."""
    q, k_cache, v_cache, *rows = attention_args()

    def step(q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        ops.write_pages(k, k * 2, k_cache, v_cache, slots)
        out, _ = ops.seg_paged_attention(q * 2, k_cache, v_cache, *rows)
        return ops.token_importance(out) + 1

    k = torch.randn(1, 2, 32)
    slots = torch.tensor([[int(rows[1][0, 0]) * 16, -1]])
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    got = compiled(q, k, k_cache.clone(), v_cache.clone())
    torch.testing.assert_close(got, step(q, k, k_cache, v_cache), rtol=0, atol=0)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r'_cpu_isa: isa must be one .* got "sve"'):
        RAW._cpu_isa("sve")


class OnGpu(Tensor):
    """Says cuda:0 and holds nothing: an operator that read its values would not survive it."""

    @staticmethod
    def __new__(cls, like: Tensor) -> OnGpu:
        return Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device="cuda:0"
        )

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> object:
        raise AssertionError(f"{func} was called")


@pytest.mark.skipif(ops.has_cuda_kernels(), reason="redknot was built with CUDA")
@pytest.mark.parametrize("name", cases())
def test_a_build_without_cuda_refuses_tensors_on_a_gpu(name: str) -> None:
    op, args, kwargs = tree_map_only(Tensor, OnGpu, cases()[name])
    lend_device_guard()
    message = r"must be on the CPU: redknot was built without CUDA"
    with torch._C._DisableTorchDispatch(), pytest.raises(RuntimeError, match=message):
        op(*args, **kwargs)


def test_a_missing_library_names_the_build_command(tmp_path: Path) -> None:
    shutil.copy(Path(ops.__file__).with_name("library.py"), tmp_path / "unbuilt.py")
    run = subprocess.run(
        [sys.executable, "-c", "import unbuilt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "ImportError: redknot's operators are not built" in run.stderr
    assert "pip install -e . --no-build-isolation" in run.stderr
