"""Scores of a generated text against reference answers: exact match, F1, recall of strings."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["METRICS", "exact_match", "f1", "normalise", "recall"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and superfluous space (as in SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1.0 when `text` equals one of `answers` after normalisation, else 0.0."""
    return float(any(normalise(text) == normalise(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words; the best of `answers`."""
    return max(_f1(normalise(text).split(), normalise(answer).split()) for answer in answers)


def _f1(words: list[str], wanted: list[str]) -> float:
    common = sum((Counter(words) & Counter(wanted)).values())
    if not common:
        return float(words == wanted)  # both empty
    return 2 * common / (len(words) + len(wanted))


def recall(text: str, answers: Sequence[str]) -> float:
    """Share of `answers` that occur in `text`, case ignored (RULER's measure)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


METRICS = {"exact_match": exact_match, "f1": f1, "recall": recall}
