"""Which checkpoint a model is, whatever has been put on top of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from redknot.models.hf_compat import backbone_of
from redknot.store import model_fingerprint

__all__ = ["checkpoint_fingerprint"]


def checkpoint_fingerprint(model: Any) -> str:
    """Hash of the checkpoint that a model was loaded from; what a head map is tied to.

    Taken from the configuration, the token embedding and the weights of all norms: what adapters
    (LoRA) and weight quantisation leave alone, and what differs between any two checkpoints that
    were trained, or fine-tuned in full. So a map measured on a checkpoint also fits it quantised,
    in another dtype or with adapters on it, merged or not. It is no key for cached K and V, which
    all of these change (`redknot.store.model_fingerprint` of all weights is).

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, possibly wrapped.

    Returns
    -------
    str
        Hex SHA-256, the same in every process.
    """
    _, decoder = backbone_of(model)
    weights: dict[str, Tensor] = {}
    for name, weight in decoder.named_parameters():
        # Wrappers keep the module they wrap under one of these names.
        parts = [p for p in name.split(".") if p not in ("base_layer", "original_module")]
        if len(parts) > 1 and (parts[-2] == "embed_tokens" or parts[-2].endswith("norm")):
            weights[".".join(parts)] = weight
    return model_fingerprint(decoder.config.to_dict(), weights)
