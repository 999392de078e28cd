"""The decode loop: one step for all running requests, over the pages that prefill left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from redknot._memory import OutOfPages
from redknot.engine.results import Generation, Prefill
from redknot.engine.runner import HeadRules, Runner
from redknot.engine.sampling import Sampler, Sampling, TextStream

__all__ = ["GenerationLoop", "Request"]


@dataclass(eq=False)
class Request:
    """A prefilled session and what it has generated so far."""

    number: int
    session: int
    rules: HeadRules
    prefill: Prefill
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    decode_seconds: float = 0.0
    queued_seconds: float = 0.0
    num_preemptions: int = 0
    # Set by `GenerationLoop.start`.
    max_new_tokens: int = 0
    sampler: Sampler = field(init=False, repr=False)
    text: TextStream = field(init=False, repr=False)
    eos: set[int] = field(default_factory=set)

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return 0 if self.finish_reason else self.max_new_tokens - len(self.token_ids)

    def result(self) -> Generation:
        """What was generated, and what it cost."""
        selector = self.rules.selector
        return Generation(
            text=self.text.text,
            token_ids=list(self.token_ids),
            prompt_token_ids=self.prefill.token_ids,
            finish_reason=self.finish_reason,
            ttft_seconds=self.prefill.ttft_seconds,
            seconds_per_token=self.decode_seconds / max(len(self.token_ids) - 1, 1),
            ledger=self.prefill.ledger,
            kv_bytes=self.prefill.kv_bytes,
            explanation=self.prefill.explanation,
            first_logits=self.prefill.logits,
            queued_seconds=self.queued_seconds,
            num_preemptions=self.num_preemptions,
            retrieval_page_share=None if selector is None else selector.page_share,
        )


class GenerationLoop:
    """Decodes ragged requests together; they come and go between steps.

    `max_new_tokens` and `stop` are those of requests that `start` is given no others for;
    `make_room` frees pages when a step finds too few, or raises.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        make_room: Callable[[OutOfPages], None],
    ) -> None:
        self._runner = runner
        self._make_room = make_room
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._requests: list[Request] = []

    @property
    def sessions(self) -> list[int]:
        """Sessions of all requests so far."""
        return [request.session for request in self._requests]

    def start(
        self,
        request: Request,
        sampling: Sampling,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> list[tuple[int, str]]:
        """Take over a prefilled request; returns its first token's text, as `step` does."""
        request.max_new_tokens = max_new_tokens or self._max_new_tokens
        request.sampler = Sampler(sampling, self._runner.decoder.device)
        request.text = TextStream(self._tokenizer, self._stop if stop is None else stop)
        request.eos = _eos_token_ids(self._runner.decoder.model)
        self._requests.append(request)
        return list(self._accept(request, request.prefill.logits))

    def fork(self, request: Request, number: int, sampling: Sampling | None) -> Request:
        """A second request that stands where `request` stands and shares its pages."""
        session = self._runner.pool.allocator.fork_session(request.session)
        fork = Request(number, session, request.rules, request.prefill, list(request.token_ids))
        fork.max_new_tokens, fork.finish_reason = request.max_new_tokens, request.finish_reason
        fork.text, fork.eos = request.text.fork(), request.eos
        fork.sampler = (
            request.sampler.fork()
            if sampling is None
            else Sampler(sampling, self._runner.decoder.device)
        )
        self._requests.append(fork)
        return fork

    def remove(self, request: Request) -> None:
        """Take a request out of the batch; its session stays."""
        self._requests.remove(request)

    def add(self, request: Request) -> None:
        """Take a removed request back."""
        self._requests.append(request)

    def step(self) -> list[tuple[int, str]]:
        """Decode one token of every unfinished request; returns (number, text) that is certain."""
        started = time.perf_counter()
        while True:
            running = [r for r in self._requests if not r.finish_reason]
            if not running:
                return []
            try:
                logits = self._decode(running)
                break
            except OutOfPages as missing:
                self._make_room(missing)  # perhaps by taking a request out
        pieces = [
            piece
            for request, row in zip(running, logits, strict=True)
            for piece in self._accept(request, row)
        ]
        elapsed = time.perf_counter() - started
        for request in running:
            request.decode_seconds += elapsed
        return pieces

    def run(self) -> Iterator[tuple[int, str]]:
        """Decode until every request is finished."""
        while any(not request.finish_reason for request in self._requests):
            yield from self.step()

    def results(self) -> list[Generation]:
        """One result for each request, in their order."""
        return [request.result() for request in self._requests]

    def release(self) -> None:
        """Give back the pages of every request."""
        while self._requests:
            self._runner.pool.allocator.release_session(self._requests.pop().session)

    def _decode(self, running: Sequence[Request]) -> torch.Tensor:
        last = torch.tensor([r.token_ids[-1] for r in running], device=self._runner.decoder.device)
        return self._runner.decode([r.session for r in running], last, [r.rules for r in running])

    def _accept(self, request: Request, logits: torch.Tensor) -> Iterator[tuple[int, str]]:
        """Choose the next token of a request from its logits [vocab_size]."""
        token = request.sampler.next_token(logits)
        request.token_ids.append(token)
        stream = request.text
        piece = stream.put(token)
        if token in request.eos:
            request.finish_reason = "eos"
        elif stream.stopped:
            request.finish_reason = "stop"
        elif len(request.token_ids) == request.max_new_tokens:
            request.finish_reason = "length"
        if request.finish_reason:
            piece += stream.end()
        if piece:
            yield request.number, piece


def _eos_token_ids(model: Any) -> set[int]:
    config = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, (list, tuple)) else {int(eos)}
