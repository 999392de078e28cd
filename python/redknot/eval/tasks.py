"""Evaluation tasks with answers, in the language of the demo models (`arrivals`).

One prompt carries the questions of every task, so that all of them share its documents:

* ``direct``: one document states the hour;
* ``relative``: a document points at an earlier one, less than half of the prompt away;
* ``distant``: the same over at least half of the prompt;
* ``chain``: three documents, ``A`` follows ``B`` who follows ``C``; training has no such facts;
* ``conflict``: two documents state different hours, the later one is right; training has none;
* ``count``: how many documents come from a place, written as an hour; training has none.

The last three ask for what the shipped model was never taught. They are there to be shown, with the
dense score beside them; nothing is claimed about reuse where dense itself fails.

Prompts are drawn from streams ``default_rng((11, seed, context_tokens))``, which no training or
calibration uses, with lengths and numbers of documents that training does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from redknot.eval import arrivals

__all__ = [
    "TASKS",
    "TAUGHT_TASKS",
    "EvalPrompt",
    "EvalQuestion",
    "make_task_batch",
    "make_task_prompt",
]

# Task: most questions of it in one prompt.
TASKS = {"direct": 14, "relative": 14, "distant": 14, "chain": 4, "conflict": 4, "count": 4}

TAUGHT_TASKS = ("direct", "relative", "distant")

_MIN_DOCUMENT_TOKENS = 16
_STREAM = 11  # keeps these prompts apart from every other stream of the same seeds
_MAX_FACTS = 120  # names are unique in a prompt, and there are 141 of them
# Forms of one prompt begin with the same word: its questions can share a prefill up to there.
_FORMS = (arrivals.QUESTION_FORMS[0::2], arrivals.QUESTION_FORMS[1:2])
_COUNT_FORM = "What is from {} ?"


@dataclass(frozen=True)
class EvalQuestion:
    """One question.

    Attributes
    ----------
    task : str
        One of `TASKS`, or the name of a file of text tasks.
    text : str
        As it stands behind the documents.
    answers : tuple of str
        Any of them is right.
    evidence : tuple of int
        Indices of the documents it needs, ascending; empty where that is not known.
    """

    task: str
    text: str
    answers: tuple[str, ...]
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True)
class EvalPrompt:
    """Documents in prompt order; each question is asked alone behind all of them."""

    documents: tuple[str, ...]
    questions: tuple[EvalQuestion, ...]


@dataclass(frozen=True)
class _Fact:
    name: str
    hour: int
    kind: str
    documents: tuple[int, ...]
    sentence: tuple[str, ...]


def make_task_prompt(seed: int, context_tokens: int) -> EvalPrompt:
    """Make the prompt of `seed` with the questions of every task.

    Parameters
    ----------
    seed : int
        At least 0; equal seeds give equal prompts on every machine.
    context_tokens : int
        At least 128: upper bound on BOS and the documents together, missed by fewer than 20.
    """
    writer = _Writer(np.random.default_rng((_STREAM, seed, context_tokens)), context_tokens)
    documents = writer.documents()
    return EvalPrompt(documents, writer.questions(_FORMS[seed % 2], TASKS))


def make_task_batch(
    rng: np.random.Generator, batch_size: int, context_tokens: int, num_questions: int
) -> arrivals.Batch:
    """Draw training sequences of every task, as `arrivals.make_batch` does of its two kinds.

    Questions with evidence in one document count as direct, all others as relative.
    """
    rows = []
    for _ in range(batch_size):
        writer = _Writer(rng, context_tokens)
        tokens = [] if rng.random() < 0.1 else [arrivals.TOKEN_IDS[arrivals.BOS]]
        for document in writer.documents():
            tokens += arrivals.encode(document)
        hours = writer.hours_of_pointing_facts()
        asked = writer.questions(_FORMS[int(rng.integers(len(_FORMS)))], TASKS)
        questions = [
            (q.text, q.answers[0], "direct" if q.task in ("direct", "count") else "relative")
            for q in asked
        ]
        order = rng.permutation(len(questions))[:num_questions]
        rows.append(arrivals.sequence(tokens, [questions[i] for i in order], hours))
    return arrivals.padded(rows)


class _Writer:
    """Writes the documents of one prompt in order and remembers what they say."""

    def __init__(self, rng: np.random.Generator, context_tokens: int) -> None:
        self.num_tokens = 1  # BOS
        self._rng = rng
        self._begins: list[int] = []  # of the documents so far
        self._context_tokens = context_tokens
        self._half = context_tokens // 2
        self._tokens_per_fact = max(14, context_tokens // _MAX_FACTS)
        self._names = [arrivals.NAMES[i] for i in rng.permutation(len(arrivals.NAMES))]
        self._facts: list[_Fact] = []
        self._disputed: dict[str, _Fact] = {}  # stated once so far, and to be contradicted
        self._places: list[str] = []

    def documents(self) -> tuple[str, ...]:
        """Write documents until the context is full."""
        shortest, longest = (40, 72) if self._context_tokens <= 4096 else (96, 160)
        written = []
        while (room := self._context_tokens - self.num_tokens) >= _MIN_DOCUMENT_TOKENS:
            length = min(int(self._rng.integers(shortest, longest)), room)
            written.append(self._document(length))
        return tuple(written)

    def _document(self, length: int) -> str:
        """Write the next document: at most `length` tokens, fewer by less than a sentence."""
        rng, index = self._rng, len(self._begins)
        self._begins.append(self.num_tokens)
        place = arrivals.pick(rng, arrivals.PLACES)
        self._places.append(place)
        num_facts = max(1, (length - arrivals.HEADER_TOKENS) // self._tokens_per_fact)
        new = [self._draw_fact(index) for _ in range(min(num_facts, len(self._names)))]
        self._facts += new
        sentences = [fact.sentence for fact in new]
        left = length - arrivals.HEADER_TOKENS - sum(map(len, sentences))
        sentences += [arrivals.filler_sentence(rng) for _ in range(left // arrivals.FILLER_TOKENS)]
        self.num_tokens += arrivals.HEADER_TOKENS + sum(map(len, sentences))
        lines = [f"{arrivals.pick(rng, arrivals.DOCUMENT_KINDS)} from {place} :"]
        lines += [" ".join(sentences[i]) for i in rng.permutation(len(sentences))]
        return "\n".join(lines) + "\n"

    def _draw_fact(self, index: int) -> _Fact:
        rng, here = self._rng, self._begins[index]
        direct = [fact for fact in self._facts if fact.kind == "direct"]
        far = [f for f in direct if here - self._begins[f.documents[0]] >= self._half]
        near = [f for f in direct if here - self._begins[f.documents[0]] < self._half]
        hops = [fact for fact in self._facts if fact.kind in ("relative", "distant")]
        open_disputes = [fact for fact in self._disputed.values() if fact.documents[0] < index]
        draw = rng.random()
        if draw < 0.25 and near:
            return self._pointing(index, "relative", near)
        if draw < 0.60 and far:
            return self._pointing(index, "distant", far)
        if draw < 0.66 and hops:
            return self._pointing(index, "chain", hops)
        if draw < 0.72 and open_disputes:
            return self._contradiction(index, open_disputes)
        disputed = 0.72 <= draw < 0.80
        fact = self._stating(index, self._names.pop(), "disputed" if disputed else "direct")
        if disputed:
            self._disputed[fact.name] = fact
        return fact

    def _pointing(self, index: int, kind: str, targets: list[_Fact]) -> _Fact:
        rng = self._rng
        target = targets[int(rng.integers(len(targets)))]
        step, name = int(rng.integers(len(arrivals.OFFSETS))), self._names.pop()
        verb = arrivals.pick(rng, arrivals.FOLLOW_VERBS)
        sentence = (name, verb, target.name, arrivals.OFFSETS[step], ".")
        documents = (*target.documents, index)
        return _Fact(name, (target.hour + step + 1) % 24, kind, documents, sentence)

    def _stating(self, index: int, name: str, kind: str, not_at: int | None = None) -> _Fact:
        hour = int(self._rng.integers(24))
        if hour == not_at:
            hour = (hour + 7) % 24
        verb = arrivals.pick(self._rng, arrivals.ARRIVAL_VERBS)
        return _Fact(name, hour, kind, (index,), (name, verb, arrivals.HOURS[hour], "."))

    def _contradiction(self, index: int, disputes: list[_Fact]) -> _Fact:
        first = self._disputed.pop(disputes[int(self._rng.integers(len(disputes)))].name)
        fact = self._stating(index, first.name, "conflict", not_at=first.hour)
        return replace(fact, documents=(*first.documents, index))

    def hours_of_pointing_facts(self) -> dict[int, int]:
        """Map the token id of each person who follows another to that of the hour it amounts to."""
        return {
            arrivals.TOKEN_IDS[fact.name]: arrivals.TOKEN_IDS[arrivals.HOURS[fact.hour]]
            for fact in self._facts
            if fact.kind in ("relative", "distant", "chain")
        }

    def questions(
        self, forms: tuple[str, ...], most_of_task: Mapping[str, int]
    ) -> tuple[EvalQuestion, ...]:
        """Questions of every task, at most as many of each as `most_of_task` says."""
        asked: list[EvalQuestion] = []
        for task, most in most_of_task.items():
            facts = [fact for fact in self._facts if fact.kind == task]
            for i in self._rng.permutation(len(facts))[:most]:
                text = arrivals.pick(self._rng, forms).format(facts[i].name)
                hour = arrivals.HOURS[facts[i].hour]
                asked.append(EvalQuestion(task, text, (hour,), facts[i].documents))
        if _COUNT_FORM.split()[0] == forms[0].split()[0]:
            places = sorted(set(self._places))
            for i in self._rng.permutation(len(places))[: most_of_task["count"]]:
                where = tuple(j for j, place in enumerate(self._places) if place == places[i])
                answer = arrivals.HOURS[len(where) % 24]
                asked.append(EvalQuestion("count", _COUNT_FORM.format(places[i]), (answer,), where))
        return tuple(asked)
