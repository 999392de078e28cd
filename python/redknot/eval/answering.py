"""One prompt answered by every candidate: the same tokens, the same questions, one record.

The documents' recovery does not depend on which question follows, so all questions of a prompt go
through `Engine.generate_shared`. Time, FLOPs and bytes are measured where a user meets them:
`Engine.generate`, one question, documents cached; that answer is counted, and compared with the
shared one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redknot.engine import Engine, Generation
from redknot.eval.candidates import Candidate
from redknot.eval.scoring import METRICS, exact_match
from redknot.eval.tasks import EvalPrompt

__all__ = ["Decoding", "answer_prompt"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """How a group of prompts is decoded and scored.

    Attributes
    ----------
    max_new_tokens : int
        Greedy tokens of an answer.
    metric : str
        One of `scoring.METRICS`.
    compared_tokens : int, optional
        First tokens of an answer that count for the agreement with dense; None: all of dense's.
    stop : tuple of str
        Texts at which an answer ends.
    """

    max_new_tokens: int
    metric: str
    compared_tokens: int | None = None
    stop: tuple[str, ...] = ()


def answer_prompt(
    candidates: Sequence[Candidate], prompt: EvalPrompt, decoding: Decoding, timed: int | None
) -> Record:
    """Answer all questions of `prompt` under every candidate; the first one is the reference.

    `timed` is the index of the question that is asked alone and measured; None: none is.
    """
    texts = [question.text for question in prompt.questions]
    engines = {id(c.engine): c.engine for c in candidates}
    ids = {key: _add(engine, prompt, candidates) for key, engine in engines.items()}
    answers: dict[str, list[Generation]] = {}
    if len(texts) > 1:
        for c in candidates:
            answers[c.label] = c.engine.generate_shared(
                ids[id(c.engine)],
                texts,
                policy=c.policy,
                max_new_tokens=decoding.max_new_tokens,
                stop=decoding.stop,
            )
    costs: dict[str, Any] = {}
    same: dict[str, bool] = {}
    if timed is not None or len(texts) == 1:
        timed = timed or 0
        for c in candidates:
            alone = c.engine.generate(
                ids[id(c.engine)],
                texts[timed],
                policy=c.policy,
                max_new_tokens=decoding.max_new_tokens,
                stop=decoding.stop,
            )
            costs[c.label] = _costs(alone)
            shared = answers.setdefault(c.label, [alone])
            same[c.label] = shared[timed].token_ids == alone.token_ids
            shared[timed] = alone
    for engine in engines.values():
        engine.clear()
    reference = answers[candidates[0].label]
    return {
        "prompt_tokens": len(reference[0].prompt_token_ids),
        "questions": [question.task for question in prompt.questions],
        "answers": {
            label: _measure(prompt, given, reference, decoding) for label, given in answers.items()
        },
        "costs": costs,
        "shared_equals_alone": same,
    }


def _add(engine: Engine, prompt: EvalPrompt, candidates: Sequence[Candidate]) -> list[str]:
    """Cache the documents with all that the engine's candidates want stored."""
    ids = [engine.add(text) for text in prompt.documents]
    layers = {c.policy.entry_layer(engine.heads) for c in candidates if c.engine is engine}
    for layer in layers - {None}:
        for document in ids:
            engine.documents.find(document, hidden_layer=layer)
    return ids


def _measure(
    prompt: EvalPrompt,
    given: Sequence[Generation],
    reference: Sequence[Generation],
    decoding: Decoding,
) -> dict[str, list[Any]]:
    """Per question: score, exact match, KL of the first token, [agreeing, compared] tokens."""
    score = METRICS[decoding.metric]
    found: dict[str, list[Any]] = {"score": [], "exact_match": [], "kl": [], "agreement": []}
    for question, answer, dense in zip(prompt.questions, given, reference, strict=True):
        found["score"].append(round(score(answer.text, question.answers), 6))
        found["exact_match"].append(exact_match(answer.text, question.answers))
        p = dense.first_logits.float().log_softmax(-1)
        q = answer.first_logits.float().log_softmax(-1)
        found["kl"].append(float(f"{(p.exp() * (p - q)).sum().clamp(min=0).item():.6g}"))
        compared = dense.token_ids[: decoding.compared_tokens]
        agreeing = sum(a == b for a, b in zip(answer.token_ids, compared, strict=False))
        found["agreement"].append([agreeing, len(compared)])
    return found


def _costs(answer: Generation) -> dict[str, float]:
    documents = answer.explanation.documents
    heads = [d.heads_refreshed / (d.heads_refreshed + d.heads_reused) for d in documents]
    parts = answer.ledger.parts
    return {
        "ttft_seconds": answer.ttft_seconds,
        "seconds_per_token": answer.seconds_per_token,
        "flops": answer.ledger.flops,
        "dense_flops": answer.ledger.dense_flops,
        "ffn_flops": parts.get("ffn", 0.0),
        "kv_bytes": answer.kv_bytes,
        "rows_recomputed": sum(d.rows_recomputed for d in documents),
        "document_tokens": sum(d.end - d.begin for d in documents),
        "heads_refreshed": sum(heads) / max(len(heads), 1),
    }
