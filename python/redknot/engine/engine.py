"""`Engine`: documents cached once, reused anywhere in a prompt, recovered per head, answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redknot.cache import KVPool, bytes_per_page
from redknot.engine.admission import Admission
from redknot.engine.budget import num_pages_of, parse_bytes
from redknot.engine.documents import DocumentCache
from redknot.engine.generation import GenerationLoop
from redknot.engine.prompt import PromptFormat, TextOrIds
from redknot.engine.results import Explanation, Generation, Prefill
from redknot.engine.runner import Runner
from redknot.engine.sampling import Sampler, Sampling, TextStream
from redknot.engine.scheduler import Scheduler
from redknot.engine.segment_tiers import SegmentTiers
from redknot.engine.session import GenerationRequest, Session
from redknot.engine.shared import start_shared
from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.models import Decoder, checkpoint_fingerprint, load_model, load_tokenizer
from redknot.recovery import (
    Policy,
    RedKnot,
)
from redknot.store import MemoryStore, TieredStore, model_fingerprint, open_tiers, parse_url

if TYPE_CHECKING:
    from redknot._memory import AllocatorStats

__all__ = ["Engine"]


class Engine:
    """Head-aware KV reuse for one Hugging Face model.

    Parameters
    ----------
    model : PreTrainedModel, str or Path
        A Llama, Mistral, Qwen2, Qwen3 or Gemma 2 causal language model, or where to load one
        from. It is not changed. On CUDA it must be in bfloat16 or float16; the page pool lies
        beside it.
    heads : HeadMap, str or Path, optional
        Which KV heads are global; default: all of them, which is exact.
    policy : Policy, optional
        How reused documents are recovered; default `RedKnot()`.
    prefix : str or token ids, optional
        System prompt in front of the documents; default: the model's BOS alone.
    tokenizer : PreTrainedTokenizerBase, optional
        Default: the one saved beside the model, when text is first used.
    kv_budget : int or str, optional
        Bytes of the page pool ("8GiB"); default: a quarter of what is free where the model is.
    store : str or sequence of str
        Where segments are kept besides the page pool, nearest first: "mem:?capacity=4GiB" (host
        memory), "lmdb:///path" (this machine's processes), "redis://host:6379/0" (machines). Each
        takes `?capacity=`, `policy=`, `ttl=` and `timeout=` (`redknot.store.parse_url`). "mem:"
        alone: nowhere else.
    salt : str
        Segments are found only by engines with the same salt: one for each tenant of a store.
    page_size : int
        Token slots per page, of one KV head of one layer.
    chat : bool, optional
        Use the tokenizer's chat template; default: where there is one.
    separator : str, optional
        Text between documents; default: a blank line in a chat prompt, nothing otherwise.
    behind_prefix : bool
        Compute documents behind the prefix (default), or alone from position 0 as published.
    poison_freed_pages : bool, optional
        Fill freed pages with NaN, to prove that nothing reads them.

    Raises
    ------
    ModelError, HeadMapError, InputError, BudgetError
        Before anything is computed.
    """

    def __init__(
        self,
        model: Any,
        heads: HeadMap | str | Path | None = None,
        *,
        policy: Policy | None = None,
        prefix: TextOrIds | None = None,
        tokenizer: Any = None,
        kv_budget: int | str | None = None,
        store: str | Sequence[str] = "mem:",
        salt: str = "",
        page_size: int = 64,
        chat: bool | None = None,
        separator: str | None = None,
        behind_prefix: bool = True,
        poison_freed_pages: bool | None = None,
    ) -> None:
        for url in [store] if isinstance(store, str) else store:
            parse_url(url)
        if not isinstance(page_size, int) or page_size < 1:
            raise InputError(f"page_size must be a positive int, got {page_size!r}")
        if isinstance(model, (str, Path)):
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
            model = load_model(model)
        self.decoder = Decoder(model)
        shape = self.decoder.shape
        if heads is None:
            heads = HeadMap.all_global(shape.num_layers, shape.num_kv_heads)
        elif not isinstance(heads, HeadMap):
            heads = HeadMap.from_json(heads)
        fingerprint = model_fingerprint(model.config.to_dict(), model.state_dict())
        heads.check_model(shape.num_layers, shape.num_kv_heads, checkpoint_fingerprint(model))
        self.heads = heads
        self.policy: Policy = policy if policy is not None else RedKnot()
        if tokenizer is None and getattr(model, "name_or_path", None):
            tokenizer = load_tokenizer(model.name_or_path, missing_ok=True)
        self.tokenizer = tokenizer
        self.format = PromptFormat(
            tokenizer, model.config, prefix=prefix, chat=chat, separator=separator
        )
        page_bytes = bytes_per_page(page_size, shape.head_dim, self.decoder.dtype)
        self.pool = KVPool(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_pages=num_pages_of(
                parse_bytes(kv_budget, self.decoder.device),
                page_bytes,
                shape.num_layers * shape.num_kv_heads,
            ),
            page_size=page_size,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            poison_freed_pages=poison_freed_pages,
        )
        self._runner = Runner(self.decoder, self.pool)
        self.store = TieredStore(open_tiers(store))
        self.documents = DocumentCache(
            self._runner,
            MemoryStore(self.pool),
            SegmentTiers(self._runner, self.store, fingerprint=fingerprint, heads=heads),
            fingerprint=fingerprint,
            salt=salt,
            prefix_ids=self.format.prefix_ids,
            behind_prefix=behind_prefix,
        )
        self._admission = Admission(self._runner, self.documents, heads)
        self._lock = threading.RLock()
        self._scheduler = Scheduler(
            self._runner, self._admission, self.tokenizer, self.policy, self._lock
        )

    # --- offline ---------------------------------------------------------------------------------

    def add(self, document: TextOrIds, *, progress: Callable[[], None] | None = None) -> str:
        """Compute and cache a document's K/V once; idempotent.

        What a tier of the store has is not computed, and not read before a request needs it.

        Parameters
        ----------
        document : str or token ids
            Text is tokenised without special tokens.
        progress : callable, optional
            Called after each layer.

        Returns
        -------
        str
            The document's id, the same for the same tokens.

        Raises
        ------
        InputError
            For an empty document, or one longer than the model's context.
        BudgetError
            When the pool cannot hold it; nothing was changed.
        """
        token_ids = self.format.document_ids(document)
        self._admission.check_length(
            len(self.format.prefix_ids) + len(token_ids), "prefix and document"
        )
        with self._lock:
            document_id = self.documents.register(token_ids)
            layer = self.policy.entry_layer(self.heads)
            if not self.documents.is_stored(document_id, hidden_layer=layer):
                self.documents.find(document_id, progress=progress, hidden_layer=layer)
            return document_id

    def prefetch(self, documents: Sequence[str]) -> None:
        """Begin to read documents from the store on threads; the next request finds them there.

        Those that are in the page pool, or in no tier, are left as they are.
        """
        with self._lock:
            layer = self.policy.entry_layer(self.heads)
            for document in dict.fromkeys(documents):
                self.documents.prefetch(document, hidden_layer=layer)

    def offline_seconds(self, documents: Sequence[str]) -> float:
        """Time that caching these documents took, each counted once; missing ones are computed."""
        with self._lock:
            return sum(self.documents.offline_seconds(d) for d in dict.fromkeys(documents))

    def clear(self) -> None:
        """Forget every document and give back its pages; the store's other tiers keep theirs."""
        with self._lock:
            self._admission.chains.clear()
            self.documents.clear()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until every document computed so far is written to the store; whether it is."""
        return self.store.flush(timeout)

    def close(self) -> None:
        """Write what waits and close the store; at exit this happens by itself."""
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}")
        return GenerationLoop(
            self._runner,
            self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=_stops(stop),
            make_room=lambda missing: self._admission.make_room((), missing, "a decode step"),
        )


def _stops(stop: Sequence[str]) -> list[str]:
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
    if len(documents) != len(question):
        raise InputError(
            f"a batch needs one list of documents for each question, got {len(documents)} lists "
            f"and {len(question)} questions"
        )
    return list(zip(documents, question, strict=True)), True
