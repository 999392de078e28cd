"""What is asked of an engine: one by one, in batches, streamed, many sessions over one pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from redknot.checks import check_count
from redknot.engine.admission import Admission
from redknot.engine.generation import GenerationLoop
from redknot.engine.prompt import PromptFormat, TextOrIds
from redknot.engine.results import Explanation, Generation, Prefill
from redknot.engine.runner import Runner
from redknot.engine.sampling import Sampler, Sampling, TextStream
from redknot.engine.scheduler import Scheduler
from redknot.engine.session import GenerationRequest, Session
from redknot.engine.shared import start_shared
from redknot.errors import InputError
from redknot.recovery import Policy

if TYPE_CHECKING:
    from redknot._memory import AllocatorStats

__all__ = ["Answers"]


class Answers:
    """Requests over the documents that an admission finds.

    Parameters
    ----------
    runner, admission
        What computes, and what gives requests their pages.
    prompt_format : PromptFormat
        Text and token ids of questions.
    tokenizer : PreTrainedTokenizerBase, optional
        For text.
    policy : Policy
        Of requests that bring none.
    """

    def __init__(
        self,
        runner: Runner,
        admission: Admission,
        prompt_format: PromptFormat,
        tokenizer: Any,
        policy: Policy,
    ) -> None:
        self.decoder, self.pool = runner.decoder, runner.pool
        self.format, self.tokenizer, self.policy = prompt_format, tokenizer, policy
        self._runner, self._admission = runner, admission
        self._lock = threading.RLock()
        self._scheduler = Scheduler(runner, admission, tokenizer, policy, self._lock)

    # --- online ----------------------------------------------------------------------------------

    def prefill(
        self, documents: Sequence[str], question: TextOrIds, *, policy: Policy | None = None
    ) -> Prefill:
        """Prefill prefix + documents + question and return the last token's logits.

        Parameters
        ----------
        documents : sequence of str
            Ids from `add`, in the order of the prompt; may be empty.
        question : str or token ids
            What stands behind the documents.
        policy : Policy, optional
            Instead of the engine's.
        """
        with self._lock:
            admitted = self._admission.admit(
                documents, self.format.question_ids(question), policy or self.policy, new_tokens=0
            )
            self.pool.allocator.release_session(admitted.session)
            return admitted.prefill

    def generate(
        self,
        documents: Sequence[str] | Sequence[Sequence[str]],
        question: TextOrIds | Sequence[TextOrIds],
        *,
        max_new_tokens: int = 64,
        policy: Policy | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> Any:
        """Answer a question over documents, or a batch of them.

        The first token comes from the prefill whose time and ledger are reported; decoding goes on
        over the same pages, where local heads keep sink + window.

        Parameters
        ----------
        documents : list of ids, or one list for each question of a batch
            Ids from `add`, in the order of the prompt.
        question : str or token ids, or a list of questions
            A list makes a batch: its requests are prefilled one by one and decoded together.
        max_new_tokens : int
            At least 1.
        temperature, top_k, top_p, seed
            See `redknot.engine.Sampling`; temperature 0 is greedy. Request i of a batch uses
            seed + i.
        stop : sequence of str
            Generation ends before the first of these texts.
        on_text : callable, optional
            Called with (request index, text) as text becomes certain.

        Returns
        -------
        Generation, or list of Generation for a batch
        """
        batch, is_batch = _requests(documents, question)
        requests = [
            GenerationRequest(
                part,
                one,
                max_new_tokens=max_new_tokens,
                policy=policy,
                sampling=Sampling(temperature, top_k, top_p, seed).for_request(number),
                stop=stop,
                share_recovered=False,
            )
            for number, (part, one) in enumerate(batch)
        ]
        results = self.run(requests, on_text=on_text)
        return results if is_batch else results[0]

    def generate_shared(
        self,
        documents: Sequence[str],
        questions: Sequence[TextOrIds],
        *,
        max_new_tokens: int = 64,
        policy: Policy | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Answer several questions over the same documents, greedily, each on its own.

        The documents are recovered once, together with the tokens that questions have in common at
        their beginning (at least one); each question continues from a fork of that session. Where a
        policy chooses rows by the query, the common tokens are the query.

        Parameters
        ----------
        documents : list of ids
            Ids from `add`, in the order of the prompt.
        questions : sequence of str or token ids
            One result comes back for each, in this order.

        Returns
        -------
        list of Generation
            `ttft_seconds`, `ledger` and `kv_bytes` are those of the shared prefill.
        """
        if isinstance(questions, str) or not isinstance(questions, Sequence):
            raise InputError(f"questions must be a list of questions, got {questions!r}")
        ids = [self.format.question_ids(question) for question in questions]
        with self._lock:
            loop = self._loop(max_new_tokens, stop)
            try:
                numbers = start_shared(
                    self._admission,
                    self._runner,
                    loop,
                    documents,
                    ids,
                    policy or self.policy,
                    max_new_tokens=max_new_tokens,
                    make_room=lambda missing: self._admission.make_room((), missing, "a question"),
                )
                for _ in loop.run():
                    pass
                results = loop.results()
                return [results[number] for number in numbers]
            finally:
                loop.release()

    def stream(
        self,
        documents: Sequence[str],
        question: TextOrIds,
        *,
        max_new_tokens: int = 64,
        policy: Policy | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Like `generate` for one request, yielding pieces of text as they become certain."""
        request = GenerationRequest(
            documents,
            question,
            max_new_tokens=max_new_tokens,
            policy=policy,
            sampling=Sampling(temperature, top_k, top_p, seed),
            stop=stop,
            share_recovered=False,
        )
        (session,) = self.submit(request)
        return _until_left(session)

    # --- many sessions ---------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> list[Session]:
        """Queue a request; nothing is computed until somebody reads a session.

        Returns
        -------
        list of Session
            `request.n` of them. Iterate over one for its text, or call `result()`; who waits for
            one drives all that run, from any thread. Each holds its pages until it is finished or
            cancelled.

        Raises
        ------
        InputError
            For what can never be admitted.
        """
        if not isinstance(request, GenerationRequest):
            raise InputError(f"a request must be a GenerationRequest, got {request!r}")
        question_ids = self.format.question_ids(request.question)
        Sampler(request.sampling, self.decoder.device)
        TextStream(self.tokenizer, _stops(request.stop))
        with self._lock:
            return self._scheduler.submit(request, question_ids)

    def run(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Answer many requests over one pool: admitted as they fit, decoded together.

        Parameters
        ----------
        requests : sequence of GenerationRequest
            First come, first served. What does not fit yet waits for others to finish.
        on_text : callable, optional
            Called with (index of the result, text) as text becomes certain.

        Returns
        -------
        list of Generation
            In the order of `requests`; those of a request with n > 1 lie one behind the other.

        Raises
        ------
        BudgetError
            When one request does not fit into the pool alone; the others are given up.
        """
        if not isinstance(requests, Sequence):
            raise InputError(f"requests must be a list of GenerationRequest, got {requests!r}")
        if on_text is not None and not callable(on_text):
            raise InputError(f"on_text must be callable, got {on_text!r}")
        sessions: list[Session] = []
        try:
            for request in requests:
                sessions += self.submit(request)
            while not all(session.is_done for session in sessions):
                with self._lock:
                    self._scheduler.step()
                failed = [session.error for session in sessions if session.error is not None]
                if failed:
                    raise failed[0]
                if on_text is not None:
                    for number, session in enumerate(sessions):
                        for piece in session.pieces():
                            on_text(number, piece)
            return [session.result() for session in sessions]
        finally:
            for session in sessions:
                session.cancel()

    def explain(
        self, documents: Sequence[str], question: TextOrIds, *, policy: Policy | None = None
    ) -> Explanation:
        """Run a prefill and tell what was reused, recomputed or missed, and why."""
        return self.prefill(documents, question, policy=policy).explain()

    def kv_stats(self) -> AllocatorStats:
        """Pages and bytes of the pool by class, and what the store holds."""
        return self.pool.allocator.stats()

    def session_stats(self) -> dict[str, int]:
        """What became of the requests so far, who runs now, and what recovered chains are kept."""
        with self._lock:
            scheduler, chains = self._scheduler, self._admission.chains
            return {
                "waiting": len(scheduler.waiting),
                "running": len(scheduler.running),
                "preempted": len(scheduler.swapped),
                "paused": len(scheduler.paused),
                **asdict(scheduler.stats),
                "swapped_pages": self.kv_stats()["swapped_pages"],
                "recovered_chains": len(chains),
                "recovered_chain_pages": chains.pages(),
                **{f"recovered_chain_{k}": v for k, v in asdict(chains.stats).items()},
            }

    # --- inside ----------------------------------------------------------------------------------

    def _loop(self, max_new_tokens: int, stop: Sequence[str]) -> GenerationLoop:
        check_count("max_new_tokens", max_new_tokens)
        return GenerationLoop(
            self._runner,
            self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=_stops(stop),
            make_room=lambda missing: self._admission.make_room((), missing, "a decode step"),
        )


def _stops(stop: Sequence[str]) -> list[str]:
    if not isinstance(stop, Sequence):
        raise InputError(f"stop must be text or a list of texts, got {stop!r}")
    return [stop] if isinstance(stop, str) else list(stop)


def _until_left(session: Session) -> Iterator[str]:
    """Text of a session that is cancelled when its reader leaves."""
    try:
        yield from session
    finally:
        session.cancel()


def _requests(documents: Any, question: Any) -> tuple[list[tuple[Sequence[str], TextOrIds]], bool]:
    """Requests of a call to generate, and whether it was a batch."""
    is_batch = (
        isinstance(question, (list, tuple))
        and len(question) > 0
        and not isinstance(question[0], (int, np.integer))
    )
    if not is_batch:
        return [(documents, question)], False
    if not isinstance(documents, Sequence):
        raise InputError(f"documents must be a list of ids for each question, got {documents!r}")
    if len(documents) != len(question):
        raise InputError(
            f"a batch needs one list of documents for each question, got {len(documents)} lists "
            f"and {len(question)} questions"
        )
    return list(zip(documents, question, strict=True)), True
