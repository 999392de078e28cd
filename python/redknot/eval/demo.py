"""The embedded default: held-out questions over several documents, answered under each policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redknot.engine import Engine, Generation
from redknot.eval.arrivals import Prompt, Question, make_prompt
from redknot.eval.peers import hugging_face_dense
from redknot.eval.statistics import median_and_spread, wilson_interval
from redknot.heads import HeadMap
from redknot.models import load_model, load_tokenizer
from redknot.recovery import Dense, Naive, Policy, RedKnot

__all__ = [
    "DEMO_MODEL",
    "FIRST_HELD_OUT_SEED",
    "Example",
    "PolicyScore",
    "demo_engine",
    "held_out_prompts",
    "run_demo",
]

DEMO_MODEL = Path(__file__).parent / "demo_model"

# Prompts of smaller seeds were seen by training or by the head map's measurement.
FIRST_HELD_OUT_SEED = 200_000

DEMO_CONTEXT_TOKENS = 1_000
DEMO_QUESTIONS_PER_PROMPT = 24
_PAGE_SIZE = 16  # documents are short: smaller pages waste less at their ends
_PEER_EVERY = 4  # questions for one run of the peer, whose time alone is wanted
_MAX_NEW_TOKENS = 3  # the answer, the full stop, the end of the sequence


def demo_engine(
    heads: HeadMap | None = None,
    *,
    model: Path | None = None,
    kv_budget: str | int = "256MiB",
    **options: Any,
) -> Engine:
    """Return an engine over the embedded model, or another of its kind.

    `heads` is by default the head map that was measured for the model.
    """
    model = model if model is not None else DEMO_MODEL
    return Engine(
        load_model(model, dtype="float32"),
        heads if heads is not None else HeadMap.from_json(model / "head_map.json"),
        tokenizer=load_tokenizer(model),
        kv_budget=kv_budget,
        page_size=_PAGE_SIZE,
        **options,
    )


def held_out_prompts(
    num_questions: int, *, seed: int = 0, context_tokens: int = DEMO_CONTEXT_TOKENS
) -> list[Prompt]:
    """Prompts with `num_questions` questions in all, never seen in training or calibration."""
    prompts: list[Prompt] = []
    remaining, number = num_questions, FIRST_HELD_OUT_SEED + seed
    while remaining > 0:
        asked = min(DEMO_QUESTIONS_PER_PROMPT, remaining)
        prompt = make_prompt(number, context_tokens, asked)
        prompts.append(prompt)
        remaining -= len(prompt.questions)
        number += 1
    return prompts


@dataclass
class PolicyScore:
    """Sums over the questions answered under one policy."""

    global_fraction: float
    correct: int = 0
    n: int = 0
    by_kind: dict[str, list[int]] = field(default_factory=dict)
    agreeing_tokens: int = 0
    compared_tokens: int = 0
    flops: float = 0.0
    dense_flops: float = 0.0
    kv_bytes: list[int] = field(default_factory=list)
    ttft_seconds: list[float] = field(default_factory=list)

    def add(self, question: Question, answer: Generation, dense: Generation) -> None:
        """Count one answer."""
        hit = answer.text.split()[:1] == [question.answer]
        self.correct += hit
        self.n += 1
        self.by_kind.setdefault(question.kind, []).append(int(hit))
        pairs = list(zip(answer.token_ids, dense.token_ids, strict=False))
        self.agreeing_tokens += sum(a == b for a, b in pairs)
        self.compared_tokens += max(len(answer.token_ids), len(dense.token_ids))
        self.flops += answer.ledger.flops
        self.dense_flops += answer.ledger.dense_flops
        self.kv_bytes.append(answer.kv_bytes)
        self.ttft_seconds.append(answer.ttft_seconds)

    def to_dict(self, dense_ttft: float, hugging_face_ttft: float) -> dict[str, Any]:
        """Figures of one policy, as `redknot demo --json` prints them."""
        low, high = wilson_interval(self.correct, self.n)
        ttft, spread = median_and_spread(self.ttft_seconds)
        return {
            "exact_match": self.correct / self.n,
            "exact_match_interval": [low, high],
            "exact_match_by_kind": {k: sum(v) / len(v) for k, v in sorted(self.by_kind.items())},
            "token_agreement": self.agreeing_tokens / self.compared_tokens,
            "flops_saved": 1.0 - self.flops / self.dense_flops,
            "kv_bytes": round(sum(self.kv_bytes) / self.n),
            "ttft_seconds": ttft,
            "ttft_spread_seconds": spread,
            "ttft_ratio": dense_ttft / ttft,
            "ttft_ratio_hugging_face": hugging_face_ttft / ttft,
            "global_fraction": self.global_fraction,
        }


@dataclass(frozen=True)
class Example:
    """One question in full."""

    prompt: Prompt
    question: Question
    answers: dict[str, Generation]


def run_demo(
    num_questions: int,
    *,
    seed: int = 0,
    context_tokens: int = DEMO_CONTEXT_TOKENS,
    policies: Sequence[tuple[str, Policy, Engine]] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], Example]:
    """Answer held-out questions under every policy, on the same tokens, in one run.

    Parameters
    ----------
    num_questions : int
        Questions in all; each is asked alone behind the documents of its prompt.
    seed : int
        Which held-out prompts.
    context_tokens : int
        Length of the documents together.
    policies : sequence of (name, policy, engine), optional
        Default: dense, naive and RedKnot on the measured head map. The first is the reference.
    progress : callable
        Called with the number of questions answered by all policies.

    Returns
    -------
    dict, Example
        {"n", "context_tokens", "policies": {name: figures}}, and one two-document question.
    """
    if policies is None:
        engine = demo_engine()
        policies = [(p.name, p, engine) for p in (Dense(), Naive(), RedKnot())]
    scores = {
        name: PolicyScore(policy.effective_heads(engine.heads).global_fraction)
        for name, policy, engine in policies
    }
    reference, _, reference_engine = policies[0]
    hugging_face: list[float] = []
    example: Example | None = None
    done = prompt_tokens = 0
    for prompt in held_out_prompts(num_questions, seed=seed, context_tokens=context_tokens):
        ids = {id(e): [e.add(text) for text in prompt.documents] for _, _, e in policies}
        for question in prompt.questions:
            answers = {
                name: engine.generate(
                    ids[id(engine)], question.text, policy=policy, max_new_tokens=_MAX_NEW_TOKENS
                )
                for name, policy, engine in policies
            }
            dense = answers[reference]
            for name, answer in answers.items():
                scores[name].add(question, answer, dense)
            if done % _PEER_EVERY == 0:
                run = hugging_face_dense(
                    reference_engine.decoder.model, dense.prompt_token_ids, max_new_tokens=1
                )
                hugging_face.append(run.ttft_seconds)
            prompt_tokens += len(dense.prompt_token_ids)
            if example is None and question.kind == "relative":
                example = Example(prompt, question, answers)
            done += 1
            progress(done)
        for _, _, engine in policies:
            engine.clear()
    assert example is not None
    dense_ttft = median_and_spread(scores[reference].ttft_seconds)[0]
    hugging_face_ttft = median_and_spread(hugging_face)[0]
    figures = {
        "n": done,
        "prompt_tokens": round(prompt_tokens / done),
        "hugging_face_ttft_seconds": hugging_face_ttft,
        "policies": {
            name: score.to_dict(dense_ttft, hugging_face_ttft) for name, score in scores.items()
        },
    }
    return figures, example
