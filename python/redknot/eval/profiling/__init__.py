"""Profiling: which heads of a model need the whole context, measured on calibration texts."""

from redknot.eval.profiling.calibration import read_texts
from redknot.eval.profiling.head_profile import HeadProfile, agreement
from redknot.eval.profiling.mass import attention_mass, distance_grid
from redknot.eval.profiling.profile import METHODS, profile_heads

__all__ = [
    "METHODS",
    "HeadProfile",
    "agreement",
    "attention_mass",
    "distance_grid",
    "profile_heads",
    "read_texts",
]
