"""Decoder: stock models take the fused steps, and each step computes what their modules compute."""

from __future__ import annotations

import pytest
import torch
from paged_case import assert_close
from tiny_models import CONFIGS, tiny_model
from torch import Tensor

from redknot import ops
from redknot.models import Decoder

pytestmark = pytest.mark.transformers


def hidden_states(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)

    def counted(name: str, real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return real(*args, **kwargs)  # type: ignore[operator]

        return call

    for name in names:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return calls


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "gemma2"])
@torch.inference_mode()
def test_stock_models_take_the_fused_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "gathered_ffn", "rms_norm")
    decoder, x = Decoder(tiny_model(family)), hidden_states(5)
    decoder.attention_norm(0, x)
    decoder.add_ffn(0, x)
    decoder.add_sparse_ffn(0, x, torch.tensor([1, 3]).int(), torch.tensor([2]).int())
    assert calls == {"gathered_ffn": 2, "rms_norm": 1}
    positions = torch.arange(5, dtype=torch.int32)
    decoder.query(0, x, positions)
    decoder.key_value(0, x, positions)
    assert calls["rms_norm"] == (3 if family == "qwen3" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_steps_equal_the_models_modules(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    exact = tiny_model(dtype=torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    x = hidden_states(37, dtype)
    decoder = Decoder(model)

    def ffn(which: torch.nn.Module, hidden: Tensor) -> Tensor:
        block = which.model.layers[1]
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    assert_close(decoder.add_ffn(1, x.clone()), ffn(exact, x.double()), ffn(model, x))
    norm, exact_norm = model.model.layers[1].input_layernorm, exact.model.layers[1].input_layernorm
    assert_close(decoder.attention_norm(1, x), exact_norm(x.double()), norm(x))


@torch.inference_mode()
def test_modules_that_were_replaced_or_hooked_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_model(), hidden_states(5000)
    block = model.model.layers[0]
    plain = Decoder(model).add_ffn(0, x.clone())
    seen: list[int] = []
    for module in (block.post_attention_layernorm, block.mlp.gate_proj, block.input_layernorm):
        module.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    calls = count_calls(monkeypatch, "gathered_ffn", "rms_norm")
    decoder = Decoder(model)
    torch.testing.assert_close(decoder.add_ffn(0, x.clone()), plain)
    assert seen == [2500] * 4, "equal chunks, through the modules"
    decoder.attention_norm(0, x)
    assert seen[-1] == 5000 and calls == {"gathered_ffn": 0, "rms_norm": 0}


@torch.inference_mode()
def test_attention_is_added_to_a_tensor_of_its_own() -> None:
    decoder, x = Decoder(tiny_model()), hidden_states(3)
    before = x.clone()
    added = decoder.add_attention(0, x, torch.randn(3, 4, 32))
    assert torch.equal(x, before) and not torch.equal(added, before)
