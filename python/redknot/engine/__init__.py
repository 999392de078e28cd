"""The engine: offline caching, prefill under a policy, generation, explanation."""

from redknot.engine.engine import Engine
from redknot.engine.results import DocumentReport, Explanation, Generation, Prefill
from redknot.engine.sampling import Sampling
from redknot.engine.session import GenerationRequest, Session

__all__ = [
    "DocumentReport",
    "Engine",
    "Explanation",
    "Generation",
    "GenerationRequest",
    "Prefill",
    "Sampling",
    "Session",
]
