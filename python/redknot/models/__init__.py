"""Hugging Face models: families, loading, and a decoder taken apart."""

from redknot.models.decoder import Decoder
from redknot.models.families import FAMILIES, Family, family_of, shape_of
from redknot.models.fingerprint import checkpoint_fingerprint
from redknot.models.loading import load_config, load_model, load_tokenizer

__all__ = [
    "FAMILIES",
    "Decoder",
    "Family",
    "checkpoint_fingerprint",
    "family_of",
    "load_config",
    "load_model",
    "load_tokenizer",
    "shape_of",
]
