"""Shapes of named models, as their published configurations have them."""

from __future__ import annotations

from redknot.recovery import ModelShape

__all__ = ["SHAPES"]


def _shape(layers: int, q: int, kv: int, hidden: int, ffn: int, vocab: int) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        num_q_heads=q,
        num_kv_heads=kv,
        head_dim=128,
        hidden_dim=hidden,
        ffn_dim=ffn,
        vocab_size=vocab,
    )


SHAPES: dict[str, ModelShape] = {
    "Mistral-7B": _shape(32, 32, 8, 4096, 14336, 32_000),
    "Llama-3-8B": _shape(32, 32, 8, 4096, 14336, 128_256),
    "Qwen3-32B": _shape(64, 64, 8, 5120, 25600, 151_936),
    "Llama-3.3-70B": _shape(80, 64, 8, 8192, 28672, 128_256),
}
