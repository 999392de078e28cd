"""The one table of supported model families, and what makes a configuration unusable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redknot.errors import ModelError
from redknot.recovery import ModelShape

__all__ = ["FAMILIES", "Family", "family_of", "shape_of"]


@dataclass(frozen=True)
class Family:
    """What differs between families that share the Llama layout of modules.

    Attributes
    ----------
    model_type : str
        `config.model_type` of Hugging Face.
    qk_norm : bool
        Whether queries and keys pass an RMSNorm over head_dim before the rotation.
    sandwich_norms : bool
        Whether attention and FFN have a norm behind them too, before they are added. These
        families' norms scale by 1 + weight.
    sliding : {"never", "every_layer", "layer_types"}
        Which layers have a native sliding window: none, all where `config.sliding_window` is set,
        or those that `config.layer_types` calls "sliding_attention".
    """

    model_type: str
    qk_norm: bool = False
    sandwich_norms: bool = False
    sliding: str = "never"

    def sliding_windows(self, config: Any) -> list[int | None]:
        """Native sliding window of each layer, None where the layer sees everything."""
        window = getattr(config, "sliding_window", None)
        num_layers = config.num_hidden_layers
        if self.sliding == "never" or window is None:
            return [None] * num_layers
        if self.sliding == "every_layer":
            return [window] * num_layers
        return [window if kind == "sliding_attention" else None for kind in config.layer_types]


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral", sliding="every_layer"),
        Family("qwen2", sliding="layer_types"),
        Family("qwen3", qk_norm=True, sliding="layer_types"),
        Family("gemma2", sandwich_norms=True, sliding="layer_types"),
    )
}

# Frequencies of these depend on the current length: a key cached at one length is wrong at another.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def family_of(config: Any) -> Family:
    """Return the family of a Hugging Face config.

    Raises
    ------
    ModelError
        For a family that is not in the table, or rope frequencies that depend on the length
        (dynamic NTK, longrope), which make cached keys invalid, or attention that is not causal.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ModelError(
            f"rope_type {rope_type!r} is not supported: its frequencies depend on the current "
            "length, so cached keys cannot be moved; use a checkpoint with default, linear, "
            "llama3 or yarn scaling"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            "attention that is not causal (use_bidirectional_attention) is not supported"
        )
    return FAMILIES[model_type]


def shape_of(config: Any) -> ModelShape:
    """Return the sizes of a Hugging Face config of a supported family."""
    head_dim = getattr(config, "head_dim", None)
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        hidden_dim=config.hidden_size,
        ffn_dim=config.intermediate_size,
        vocab_size=config.vocab_size,
    )
