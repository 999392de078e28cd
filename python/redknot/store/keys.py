"""Cryptographic keys of segments: equal in every process, different for whatever could differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LAYOUT_VERSION", "model_fingerprint", "segment_key", "stored_parts"]

# Raised whenever the meaning of stored bytes changes; older segments are then never found.
LAYOUT_VERSION = 1

# Values read per weight: enough to tell any two checkpoints apart, cheap on the largest.
_SAMPLES_PER_WEIGHT = 1024

# What of a configuration decides what is computed; a list of what to leave out would change with
# every version of transformers.
_COMPUTED_FROM = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)


def _digest(parts: Sequence[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def model_fingerprint(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Hash of a model: its configuration, and a sample of every weight.

    The sample is rounded to bfloat16 first, so that a checkpoint has one fingerprint whatever dtype
    it is loaded in.

    Parameters
    ----------
    config : mapping
        The configuration, as `config.to_dict()` gives it.
    weights : mapping of str to Tensor
        Names and weights, as `model.state_dict()` gives them.
    """
    import torch

    described = {name: config.get(name) for name in _COMPUTED_FROM}
    parts = [json.dumps(described, sort_keys=True, default=str).encode()]
    for name in sorted(weights):
        weight = weights[name].detach().flatten()
        count = weight.numel()
        index = np.linspace(0, max(count - 1, 0), min(count, _SAMPLES_PER_WEIGHT)).astype(np.int64)
        sample = weight[torch.from_numpy(index).to(weight.device)].bfloat16().float().cpu().numpy()
        parts += [name.encode(), str(tuple(weights[name].shape)).encode(), sample.tobytes()]
    return _digest(parts)


def stored_parts(hidden_layer: int | None) -> str:
    """Name, for `segment_key`, what a segment keeps: K and V, or hidden states of a layer too."""
    return "kv" if hidden_layer is None else f"kv+hidden@{hidden_layer}"


def segment_key(
    *,
    fingerprint: str,
    dtype: torch.dtype,
    inv_freq: np.ndarray,
    prefix_ids: Sequence[int] | np.ndarray,
    token_ids: Sequence[int] | np.ndarray,
    stored: str = "kv",
    salt: str = "",
) -> str:
    """Key of one segment (hex SHA-256).

    Parameters
    ----------
    fingerprint : str
        Of the model (`model_fingerprint`).
    dtype : torch.dtype
        Of the stored K and V.
    inv_freq : np.ndarray
        Rope frequencies [rotary_dim / 2] fp32.
    prefix_ids : sequence of int
        Tokens the segment was prefilled behind; empty if alone.
    token_ids : sequence of int
        The segment's own tokens.
    stored : str
        What is kept for it, as `stored_parts` names it.
    salt : str
        A tenant's secret: who does not know it finds none of the tenant's segments.
    """
    return _digest(
        [
            fingerprint.encode(),
            f"{LAYOUT_VERSION} {dtype} {stored}".encode(),
            salt.encode(),
            np.ascontiguousarray(inv_freq, dtype="<f4").tobytes(),
            np.asarray(prefix_ids, dtype="<i8").tobytes(),
            np.asarray(token_ids, dtype="<i8").tobytes(),
        ]
    )
