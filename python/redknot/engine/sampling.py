"""From logits to tokens to text: greedy or sampled, with stop strings, streamed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy as copy_of
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from redknot.checks import check_count, check_number, check_share
from redknot.errors import InputError

__all__ = ["Sampler", "Sampling", "TextStream"]

# What incomplete UTF-8 decodes to: text that ends in it is held back until it is whole.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Parameters
    ----------
    temperature : float
        0: greedy, the other options are then not used.
    top_k, top_p : int, float, optional
        Keep the k best tokens; the smallest set holding this share of the probability.
    seed : int, optional
        For the same text again; None: another text each time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_share("top_p", self.top_p)
        if self.seed is not None:
            check_count("seed", self.seed, least=0)

    def for_request(self, number: int) -> Sampling:
        """The same with `seed + number`: another text for each request of a batch."""
        return self if self.seed is None else replace(self, seed=self.seed + number)


class Sampler:
    """Chooses tokens for one request; Hugging Face's warpers shape the distribution."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        from transformers import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._greedy = sampling.temperature == 0
        self._warpers: list[Any] = []
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k is not None:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p is not None:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def fork(self) -> Sampler:
        """A sampler that draws what this one would draw from here on."""
        copy = copy_of(self)
        copy._generator = torch.Generator(self._generator.device)
        copy._generator.set_state(self._generator.get_state())
        return copy

    def next_token(self, logits: Tensor) -> int:
        """Choose a token from logits [vocab_size]."""
        if self._greedy:
            return int(logits.argmax())
        scores = logits.float()[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        probabilities = scores.softmax(-1)[0]
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class TextStream:
    """Turns a growing list of tokens into pieces of text, and watches for stop strings.

    Text that could be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        for text in stop:
            if not isinstance(text, str) or not text:
                raise InputError(f"a stop string must be text and not empty, got {text!r}")
        if stop and tokenizer is None:
            raise InputError("stop strings need a tokenizer")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self.text = ""  # as it stands, without the stop string
        self.stopped = False
        self._emitted = 0

    def fork(self) -> TextStream:
        """A stream that stands where this one stands."""
        copy = copy_of(self)
        copy._token_ids = list(self._token_ids)
        return copy

    def put(self, token_id: int) -> str:
        """Add a token and return the text that became certain, perhaps empty."""
        self._token_ids.append(token_id)
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        found = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        self.text = text
        return self._emit(len(text) if self.stopped else self._certain(text))

    def end(self) -> str:
        """Return what was held back."""
        return self._emit(len(self.text))

    def _certain(self, text: str) -> int:
        end = len(text)
        while end and text[end - 1] == _INCOMPLETE:
            end -= 1
        held = (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return min(end, len(text) - max(held, default=0))

    def _emit(self, end: int) -> str:
        piece = self.text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return piece
