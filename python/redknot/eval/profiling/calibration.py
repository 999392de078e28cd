"""Calibration samples: documents, questions and the answers at which a model is watched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from redknot.engine.prompt import PromptFormat
from redknot.errors import InputError

__all__ = ["Ask", "Calibration", "Sample", "Text", "make_calibration", "read_texts"]

# A plain text, or {"documents": [...], "question": ..., "answer": ...}.
Text: TypeAlias = "str | Mapping[str, Any]"
Ids: TypeAlias = "NDArray[np.int64]"

_FIELDS = ("documents", "question", "answer")
# Of a plain text: what stands in front of the answer as the question does in a prompt.
_TEXT_QUESTION_TOKENS = 32


@dataclass(frozen=True)
class Ask:
    """A question and its answer, as token ids; the answer's tokens are what is predicted."""

    question: Ids
    answer: Ids


@dataclass(frozen=True)
class Sample:
    """Documents behind a prefix, and what is asked about them, each question on its own."""

    prefix: Ids
    documents: tuple[Ids, ...]
    asks: tuple[Ask, ...]

    @property
    def context_tokens(self) -> int:
        """Tokens of prefix and documents."""
        return len(self.prefix) + sum(map(len, self.documents))

    @property
    def num_answer_tokens(self) -> int:
        """Positions at which the model is watched."""
        return sum(len(ask.answer) for ask in self.asks)


@dataclass(frozen=True)
class Calibration:
    """Samples, and a hash of them that goes into what was measured with them."""

    samples: tuple[Sample, ...]

    @property
    def digest(self) -> str:
        """Hex SHA-256 over every token id."""
        sha = hashlib.sha256()
        for sample in self.samples:
            parts = [sample.prefix, *sample.documents]
            parts += [ids for ask in sample.asks for ids in (ask.question, ask.answer)]
            for ids in parts:
                sha.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
            sha.update(b"sample")
        return sha.hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, answer included."""
        return max(
            sample.context_tokens + max(len(ask.question) + len(ask.answer) for ask in sample.asks)
            for sample in self.samples
        )

    def describe(self) -> dict[str, Any]:
        """Return what stands in the metadata of a map."""
        return {
            "sha256": self.digest,
            "samples": len(self.samples),
            "questions": sum(len(sample.asks) for sample in self.samples),
            "answer_tokens": sum(sample.num_answer_tokens for sample in self.samples),
            "context_tokens": round(
                sum(sample.context_tokens for sample in self.samples) / len(self.samples)
            ),
        }


def read_texts(path: str | Path) -> list[Text]:
    """Read one text file, or the lines of a `.jsonl` file.

    Raises
    ------
    InputError
        Naming the file, the line and what is wrong.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from None
    if path.suffix != ".jsonl":
        if not content.strip():
            raise InputError(f"{path}: the file is empty")
        return [content]
    texts: list[Text] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_fields(row)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error.msg}") from None
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        texts.append(row)
    if not texts:
        raise InputError(f"{path}: the file is empty")
    return texts


def _check_fields(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise InputError(f"must be a JSON object, got a {type(row).__name__}")
    for field in _FIELDS:
        if field not in row:
            raise InputError(f"{field} is missing; needed are {', '.join(_FIELDS)}")
    documents = row["documents"]
    if isinstance(documents, str) or not isinstance(documents, Sequence) or not documents:
        raise InputError("documents must be a list of at least one text")


def make_calibration(
    texts: Iterable[Text],
    form: PromptFormat,
    *,
    context_tokens: int,
    document_tokens: int,
    answer_tokens: int,
    max_samples: int | None,
) -> Calibration:
    """Cut texts into samples.

    A plain text is cut into stretches of `context_tokens` tokens in documents of
    `document_tokens`, and what follows is question and answer: 32 tokens that are read and
    `answer_tokens` that are predicted. Neighbouring mappings with the same documents are one
    sample with several questions.

    Raises
    ------
    InputError
        When a text is too short, or there is none.
    """
    samples: list[Sample] = []
    last_documents: Any = None
    for text in texts:
        if isinstance(text, str):
            samples += _cut(text, form, context_tokens, document_tokens, answer_tokens)
            last_documents = None
            continue
        _check_fields(text)
        ask = Ask(form.question_ids(text["question"]), _answer_ids(form, text["answer"]))
        if text["documents"] == last_documents:
            samples[-1] = Sample(
                samples[-1].prefix, samples[-1].documents, (*samples[-1].asks, ask)
            )
            continue
        documents = tuple(form.document_ids(document) for document in text["documents"])
        samples.append(Sample(form.prefix_ids, documents, (ask,)))
        last_documents = text["documents"]
    if max_samples is not None and len(samples) > max_samples:  # evenly, not the first ones
        chosen = np.linspace(0, len(samples) - 1, max_samples).round().astype(int)
        samples = [samples[i] for i in chosen]
    if not samples:
        raise InputError("there is no text to calibrate on")
    return Calibration(tuple(samples))


def _answer_ids(form: PromptFormat, answer: Any) -> Ids:
    if isinstance(answer, str):
        if form.tokenizer is None:
            raise InputError("the answer is text, but there is no tokenizer; pass token ids")
        answer = form.tokenizer(answer, add_special_tokens=False).input_ids
    ids = np.asarray(answer, dtype=np.int64)
    if ids.ndim != 1 or not len(ids):
        raise InputError("the answer is empty; it needs at least one token")
    return ids


def _cut(
    text: str, form: PromptFormat, context_tokens: int, document_tokens: int, answer_tokens: int
) -> list[Sample]:
    ids = form.document_ids(text)
    room = context_tokens - len(form.prefix_ids)
    stride = room + _TEXT_QUESTION_TOKENS + answer_tokens
    if room < 2 * document_tokens:
        raise InputError(
            f"a context of {context_tokens} tokens holds fewer than two documents of "
            f"{document_tokens}; make documents shorter or the context longer"
        )
    samples = []
    for begin in range(0, len(ids) - stride + 1, stride):
        context, rest = ids[begin : begin + room], ids[begin + room : begin + stride]
        documents = np.split(context, range(document_tokens, len(context), document_tokens))
        ask = Ask(rest[:_TEXT_QUESTION_TOKENS], rest[_TEXT_QUESTION_TOKENS:])
        samples.append(Sample(form.prefix_ids, tuple(documents), (ask,)))
    if not samples:
        raise InputError(
            f"a text of {len(ids)} tokens is too short to calibrate on: {context_tokens} of "
            f"context, {_TEXT_QUESTION_TOKENS} read and {answer_tokens} predicted make "
            f"{stride}; use a longer text or a shorter context"
        )
    return samples
