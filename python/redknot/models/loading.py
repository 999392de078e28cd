"""Loading checkpoints, with every failure told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redknot.errors import ModelError
from redknot.models.families import family_of

__all__ = ["load_config", "load_model", "load_tokenizer"]


def load_config(model: str | Path) -> Any:
    """Read the configuration of a checkpoint folder or hub id, of a supported family."""
    from transformers import AutoConfig

    _check_folder(model)
    try:
        config = AutoConfig.from_pretrained(str(model))
    except Exception as error:  # Hugging Face raises many types here; all mean the same to a user
        raise ModelError(
            f"{model}: cannot read the model's config: {_first_line(error)}"
        ) from error
    family_of(config)
    return config


def load_model(model: str | Path, *, dtype: Any = "auto", device: str = "cpu") -> Any:
    """Load a causal language model in evaluation mode.

    Parameters
    ----------
    model : str or Path
        A checkpoint folder or hub id.
    dtype : torch.dtype or "auto"
        "auto": as the checkpoint is stored.
    device : str
        Where to put it.

    Raises
    ------
    ModelError
        For an unsupported family, missing weights, a corrupt file, or a device that is not there.
    """
    from transformers import AutoModelForCausalLM

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    config = load_config(model)
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            str(model),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
        loaded, info = result
    except Exception as error:
        raise ModelError(f"{model}: cannot load the weights: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{model}: the checkpoint lacks weights: {missing[0]}{more}")
    for name, *shapes in sorted(info.get("mismatched_keys") or ()):
        found, wanted = (list(shape) for shape in shapes)
        raise ModelError(f"{model}: {name} has shape {found}, but the config says {wanted}")
    return loaded.to(device).eval()


def load_tokenizer(model: str | Path, *, missing_ok: bool = False) -> Any:
    """Load the tokenizer saved beside a model; None if there is none and `missing_ok`."""
    from transformers import AutoTokenizer

    _check_folder(model)
    try:
        return AutoTokenizer.from_pretrained(str(model))
    except Exception as error:
        if missing_ok:
            return None
        raise ModelError(f"{model}: cannot load the tokenizer: {_first_line(error)}") from error


def _check_folder(model: str | Path) -> None:
    """Refuse a folder without a checkpoint, and what looks like a folder but is none."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{model}: no config.json in this folder; is it a checkpoint?")
    if not folder.exists() and (isinstance(model, Path) or model.startswith((".", "/", "~"))):
        raise ModelError(f"{model}: there is no such folder")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
