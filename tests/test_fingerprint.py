"""A head map belongs to a checkpoint, whatever is put on top of it, and to no other."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import prompt, tiny_model
from torch import nn

import redknot
from redknot import Engine, HeadMap, HeadMapError
from redknot.models import checkpoint_fingerprint

pytestmark = pytest.mark.transformers


class LowRank(nn.Module):
    """A LoRA layer as adapters wrap one: the base layer keeps its weight under another name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


class Int8(nn.Module):
    """A weight-only quantised layer: the weight is no parameter any more."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (base.weight.detach() / scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale, self.bias)


def replace(model, names, wrap):
    for layer in model.model.layers:
        for name in names:
            setattr(layer.self_attn, name, wrap(getattr(layer.self_attn, name)))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_adapters_quantisation_and_dtype_leave_it(family):
    plain = checkpoint_fingerprint(tiny_model(family, dtype=torch.bfloat16))
    same = [
        replace(tiny_model(family, dtype=torch.bfloat16), ["q_proj", "v_proj"], LowRank),
        replace(tiny_model(family, dtype=torch.bfloat16), ["q_proj", "k_proj", "o_proj"], Int8),
        tiny_model(family, dtype=torch.bfloat16).float(),
    ]
    assert {checkpoint_fingerprint(model) for model in same} == {plain}


def test_other_checkpoints_have_another():
    plain = checkpoint_fingerprint(tiny_model())
    tuned = tiny_model()
    with torch.no_grad():
        tuned.model.layers[1].input_layernorm.weight *= 1.02
    longer = tiny_model()
    longer.config.rope_parameters = {**longer.config.rope_parameters, "rope_theta": 5e5}
    others = [tiny_model(seed=1), tuned, longer]
    assert len({plain, *map(checkpoint_fingerprint, others)}) == 4


def test_the_map_of_a_checkpoint_serves_it_with_adapters_and_no_other_checkpoint():
    model = tiny_model()
    metadata = {"model_fingerprint": checkpoint_fingerprint(model)}
    heads = HeadMap.all_local(3, 2, window=16)
    heads = HeadMap(heads.classes, window=16, metadata=metadata)
    for wrapped in (model, replace(tiny_model(), ["q_proj", "v_proj"], LowRank)):
        Engine(wrapped, heads, kv_budget="4MiB").prefill([], [1, 2, 3])
        with redknot.attach(wrapped, heads):
            wrapped(prompt(1, 40))
    other = tiny_model(seed=1)
    before = other.config._attn_implementation
    for use in (Engine, redknot.attach):
        with pytest.raises(HeadMapError, match="measured on another model"):
            use(other, heads)
    assert other.config._attn_implementation == before
