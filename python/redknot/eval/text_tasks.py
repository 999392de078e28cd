"""Text tasks for any checkpoint: JSONL files in the formats of LongBench and RULER.

A line is one question. LongBench has ``context``, ``input`` (the question) and ``answers``; RULER
has ``outputs`` for the answers, and where there is no ``context``, ``input`` is the whole prompt
with the question as its last paragraph or line. Other fields are ignored.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redknot.errors import InputError
from redknot.eval.tasks import EvalPrompt, EvalQuestion

__all__ = ["TextTask", "read_text_task", "split_documents"]

# "Passage 3:" (LongBench), "Document 3:" and "Document [3]" (RULER and others), at a line's start.
_NUMBERED = re.compile(r"^(?=(?:Passage|Document)\s+\[?\d+\]?\s*[:(])", re.MULTILINE)
_BLANK_LINE = re.compile(r"(?<=\n)(?=[ \t]*\S)(?<=\n\n)")
_QUESTION_HEAD = re.compile(r"\n+(?=[^\n]*\S[^\n]*\s*\Z)")


@dataclass(frozen=True)
class TextTask:
    """The prompts of one file, and how their answers are scored.

    Attributes
    ----------
    name : str
        The file's name without its ending.
    metric : str
        "f1" for LongBench's ``answers``, "recall" for RULER's ``outputs``.
    """

    name: str
    metric: str
    prompts: tuple[EvalPrompt, ...]


def split_documents(context: str, separator: str | None = None) -> tuple[str, ...]:
    """Cut a context into documents which, joined, are the context again.

    `separator` is a regular expression that a document begins with. Without one: numbered
    passages where there are any, else paragraphs between blank lines.
    """
    if separator is not None:
        begins = [match.start() for match in re.finditer(separator, context, re.MULTILINE)]
    else:
        begins = [match.start() for match in _NUMBERED.finditer(context)]
        begins = begins or [match.start() for match in _BLANK_LINE.finditer(context)]
    cuts = sorted({0, *begins, len(context)})
    pieces = [context[a:b] for a, b in itertools.pairwise(cuts)]
    documents: list[str] = []
    for piece in pieces:  # a piece of blanks belongs to what stands before it
        if documents and (not piece.strip() or not documents[-1].strip()):
            documents[-1] += piece
        else:
            documents.append(piece)
    return tuple(documents)


def read_text_task(
    path: str | Path,
    *,
    question_template: str = "{input}",
    separator: str | None = None,
    limit: int | None = None,
) -> TextTask:
    """Read a JSONL file; lines with the same context follow each other into one prompt.

    Raises
    ------
    InputError
        Naming file, line and field.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if "{input}" not in question_template:
        raise InputError(f"question template {question_template!r} lacks {{input}}")
    try:
        re.compile(separator or "")
    except re.error as error:
        raise InputError(f"document separator {separator!r}: {error}") from None
    prompts: list[tuple[str, list[EvalQuestion]]] = []
    metrics = set()
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip() or (limit is not None and count == limit):
            continue
        context, question, answers, metric = _read_line(f"{path}, line {number}", line)
        metrics.add(metric)
        asked = EvalQuestion(path.stem, question_template.replace("{input}", question), answers)
        if not prompts or prompts[-1][0] != context:
            prompts.append((context, []))
        prompts[-1][1].append(asked)
        count += 1
    if not prompts:
        raise InputError(f"{path}: no questions in the file")
    if len(metrics) > 1:
        raise InputError(f"{path}: some lines have 'answers', others 'outputs'")
    return TextTask(
        path.stem,
        metrics.pop(),
        tuple(EvalPrompt(split_documents(c, separator), tuple(q)) for c, q in prompts),
    )


def _read_line(where: str, line: str) -> tuple[str, str, tuple[str, ...], str]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with input and answers")
    field, metric = ("answers", "f1") if "answers" in row else ("outputs", "recall")
    answers = row.get(field)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise InputError(f"{where}: needs 'answers' (or 'outputs'), a list of texts")
    if not all(isinstance(answer, str) and answer for answer in answers):
        raise InputError(f"{where}: {field} must be texts that are not empty, got {answers!r}")
    for name in ("input", "context"):
        if not isinstance(row.get(name, ""), str):
            raise InputError(f"{where}: {name} must be a text")
    context, question = row.get("context", ""), row.get("input", "")
    if not context.strip():
        parts = _QUESTION_HEAD.split(question, maxsplit=1)
        if len(parts) < 2 or not parts[0].strip():
            raise InputError(f"{where}: has no 'context', and 'input' no question behind a text")
        cut = len(question) - len(parts[1])
        context, question = question[:cut], question[cut:]
    if not question.strip():
        raise InputError(f"{where}: input is empty")
    return context, question, tuple(answers), metric
