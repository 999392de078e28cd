"""One request measured: medians of repeats, against dense runs on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from redknot.engine import Engine, Generation
from redknot.eval.memory import peak_memory
from redknot.eval.peers import hugging_face_dense
from redknot.recovery import Dense

__all__ = ["Comparison", "Run", "compare_with_dense"]


@dataclass(frozen=True)
class Run:
    """Medians of one way to answer."""

    name: str
    ttft_seconds: float
    seconds_per_token: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """An answer, and what it cost beside dense runs; `runs[0]` is the answer's own.

    `first_ttft_seconds` is of the first request, which is in no median: what had to be read from a
    store or built lazily is in it.
    """

    answer: Generation
    runs: tuple[Run, ...]
    offline_seconds: float
    dense_kv_bytes: int | None  # None: no dense run was asked for
    first_ttft_seconds: float

    def ttft_ratio(self, run: Run) -> float:
        """How many times faster the answer's first token came than this run's."""
        return run.ttft_seconds / self.runs[0].ttft_seconds

    def to_dict(self, names: dict[str, str]) -> dict[str, Any]:
        """All figures, for JSON; `names` maps document ids to what the user calls them."""
        answer = self.answer
        explanation = answer.explain().to_dict()
        for document in explanation["documents"]:  # type: ignore[attr-defined]
            document["name"] = names[document["id"]]
        return {
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(answer.prompt_token_ids),
            "ttft_seconds": self.runs[0].ttft_seconds,
            "first_ttft_seconds": self.first_ttft_seconds,
            "seconds_per_token": self.runs[0].seconds_per_token,
            "peak_bytes": self.runs[0].peak_bytes,
            "runs": [{**asdict(run), "ttft_ratio": self.ttft_ratio(run)} for run in self.runs],
            "ledger": answer.ledger.to_dict(),
            "offline_seconds": self.offline_seconds,
            "kv_bytes": answer.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "explain": explanation,
        }


def compare_with_dense(
    engine: Engine,
    documents: Sequence[str],
    question: str,
    *,
    repeats: int,
    compare: bool = True,
    **options: Any,
) -> Comparison:
    """Answer under the engine's policy and, with `compare`, densely in two ways.

    The dense runs are this engine's own (`Dense`) and Hugging Face's with its SDPA attention, on
    the same tokens; runs alternate, so that a busy machine disturbs all alike.
    """
    device = engine.decoder.device
    max_new_tokens = options["max_new_tokens"]
    own = engine.policy.name
    answer = engine.generate(documents, question, **options)  # warms up what is built lazily
    first = answer.ttft_seconds
    kinds: dict[str, Callable[[], Any]] = {
        own: lambda: engine.generate(documents, question, **options)
    }
    dense_kv_bytes = answer.kv_bytes if own == "dense" else None
    if compare:
        if own != "dense":
            dense = engine.generate(documents, question, policy=Dense(), **options)
            dense_kv_bytes = dense.kv_bytes
            kinds["dense"] = lambda: engine.generate(documents, question, policy=Dense(), **options)
        kinds["dense (Hugging Face)"] = lambda: hugging_face_dense(
            engine.decoder.model, answer.prompt_token_ids, max_new_tokens
        )
    measured: dict[str, list[Run]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, work in kinds.items():
            with peak_memory(device) as peak:
                result = work()
            run = Run(name, result.ttft_seconds, result.seconds_per_token, peak.bytes)
            measured[name].append(run)
            if name == own:
                answer = result
    runs = tuple(_medians(name, taken) for name, taken in measured.items())
    return Comparison(answer, runs, engine.offline_seconds(documents), dense_kv_bytes, first)


def _medians(name: str, runs: list[Run]) -> Run:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Run(
        name,
        median(run.ttft_seconds for run in runs),
        median(run.seconds_per_token for run in runs),
        int(median(peaks)) if peaks else None,
    )
