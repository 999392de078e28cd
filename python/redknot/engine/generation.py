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


@dataclass
class Request:
    """A prefilled session and what it has generated so far."""

    number: int
    session: int
    rules: HeadRules
    prefill: Prefill
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    decode_seconds: float = 0.0


class GenerationLoop:
    """Decodes a batch of ragged requests together until the last is finished."""

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
        self._eos = _eos_token_ids(runner.decoder.model)
        self._requests: list[Request] = []
        self._samplers: list[Sampler] = []
        self._streams: list[TextStream] = []

    @property
    def sessions(self) -> list[int]:
        """Sessions of all requests so far."""
        return [request.session for request in self._requests]

    def start(self, request: Request, sampling: Sampling) -> Iterator[tuple[int, str]]:
        """Take over a prefilled request and emit its first token."""
        self._requests.append(request)
        seed = None if sampling.seed is None else sampling.seed + request.number
        own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
        self._samplers.append(Sampler(own, self._runner.decoder.device))
        self._streams.append(TextStream(self._tokenizer, self._stop))
        yield from self._accept(request, request.prefill.logits)

    def run(self) -> Iterator[tuple[int, str]]:
        """Decode until every request is finished."""
        while running := [r for r in self._requests if not r.finish_reason]:
            started = time.perf_counter()
            last = torch.tensor(
                [r.token_ids[-1] for r in running], device=self._runner.decoder.device
            )
            logits = self._decode(running, last)
            pieces = [
                piece
                for request, row in zip(running, logits, strict=True)
                for piece in self._accept(request, row)
            ]
            elapsed = time.perf_counter() - started
            for request in running:
                request.decode_seconds += elapsed
            yield from pieces

    def results(self) -> list[Generation]:
        """One result for each request, in their order."""
        return [
            Generation(
                text=stream.text,
                token_ids=list(request.token_ids),
                prompt_token_ids=request.prefill.token_ids,
                finish_reason=request.finish_reason,
                ttft_seconds=request.prefill.ttft_seconds,
                seconds_per_token=request.decode_seconds / max(len(request.token_ids) - 1, 1),
                ledger=request.prefill.ledger,
                kv_bytes=request.prefill.kv_bytes,
                explanation=request.prefill.explanation,
                first_logits=request.prefill.logits,
            )
            for request, stream in zip(self._requests, self._streams, strict=True)
        ]

    def release(self) -> None:
        """Give back the pages of every request."""
        while self._requests:
            self._runner.pool.allocator.release_session(self._requests.pop().session)

    def _decode(self, running: Sequence[Request], last: torch.Tensor) -> torch.Tensor:
        """One step; documents added under an open stream may have taken the promised room."""
        sessions, rules = [r.session for r in running], [r.rules for r in running]
        while True:
            try:
                return self._runner.decode(sessions, last, rules)
            except OutOfPages as missing:
                self._make_room(missing)

    def _accept(self, request: Request, logits: torch.Tensor) -> Iterator[tuple[int, str]]:
        """Choose the next token of a request from its logits [vocab_size]."""
        token = self._samplers[request.number].next_token(logits)
        request.token_ids.append(token)
        stream = self._streams[request.number]
        piece = stream.put(token)
        if token in self._eos:
            request.finish_reason = "eos"
        elif stream.stopped:
            request.finish_reason = "stop"
        elif len(request.token_ids) == self._max_new_tokens:
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
