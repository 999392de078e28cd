"""Random tiny models of every supported family, and random documents."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 128
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# Caps that the scores and logits of random weights reach.
GEMMA2 = {
    "sliding_window": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}  # fmt: skip


def tiny_model(
    family="llama", q_heads=4, kv_heads=2, *, layers=3, dtype=torch.float32, seed=0, **options
):
    """A model with random weights, large enough that its attention is far from uniform."""
    config = CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.pad_token_id = 0
    if family == "gemma2":
        model.set_attn_implementation("eager")  # SDPA, the default of 5.16, ignores the caps
    return model.to(dtype)


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(3, VOCAB, count).tolist()
