"""`Engine`: documents cached once, reused anywhere in a prompt, recovered per head, answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redknot._memory import OutOfPages
from redknot.cache import KVPool, bytes_per_page
from redknot.engine.budget import num_pages_of, parse_bytes
from redknot.engine.documents import DocumentCache, Found, place
from redknot.engine.generation import GenerationLoop, Request
from redknot.engine.prompt import PromptFormat, TextOrIds
from redknot.engine.results import DocumentReport, Explanation, Generation, Prefill
from redknot.engine.runner import HeadRules, Prompt, Runner
from redknot.engine.sampling import Sampling
from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.models import Decoder, load_model, load_tokenizer
from redknot.recovery import (
    FlopCounter,
    Ledger,
    Policy,
    PromptLayout,
    RecoveryPlan,
    RedKnot,
    dense_prefill_flops,
)
from redknot.store import MemoryStore, model_fingerprint

__all__ = ["Engine"]


@dataclass
class _Admitted:
    """A prefilled session that still holds its pages."""

    session: int
    rules: HeadRules
    prefill: Prefill


class Engine:
    """Head-aware KV reuse for one Hugging Face model.

    Parameters
    ----------
    model : PreTrainedModel, str or Path
        A Llama, Mistral, Qwen2 or Qwen3 causal language model, or where to load one from. It is
        not changed.
    heads : HeadMap, str or Path, optional
        Which KV heads are global; default: all of them, which is exact.
    policy : Policy, optional
        How reused documents are recovered; default `RedKnot()`.
    prefix : str or token ids, optional
        System prompt in front of the documents; default: the model's BOS alone.
    tokenizer : PreTrainedTokenizerBase, optional
        Default: the one saved beside the model, when text is first used.
    kv_budget : int or str, optional
        Bytes of the page pool ("8GiB"); default: a quarter of the free memory.
    store : str
        Where segments are kept: "mem:", the pool itself.
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
        store: str = "mem:",
        page_size: int = 64,
        chat: bool | None = None,
        separator: str | None = None,
        behind_prefix: bool = True,
        poison_freed_pages: bool | None = None,
    ) -> None:
        if store != "mem:":
            raise InputError(f"store must be 'mem:' (segments stay in the page pool), got {store!r}")
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
        heads.check_model(shape.num_layers, shape.num_kv_heads, fingerprint)
        self.heads = heads
        self.policy: Policy = policy if policy is not None else RedKnot()
        if tokenizer is None and getattr(model, "name_or_path", ""):
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
                parse_bytes(kv_budget), page_bytes, shape.num_layers * shape.num_kv_heads
            ),
            page_size=page_size,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            poison_freed_pages=poison_freed_pages,
        )
        self._page_bytes = page_bytes
        self._runner = Runner(self.decoder, self.pool)
        self.documents = DocumentCache(
            self._runner,
            MemoryStore(self.pool),
            fingerprint=fingerprint,
            prefix_ids=self.format.prefix_ids,
            behind_prefix=behind_prefix,
        )
        self._lock = threading.RLock()

    # --- offline ---------------------------------------------------------------------------------

    def add(self, document: TextOrIds, *, progress: Callable[[], None] | None = None) -> str:
        """Compute and cache a document's K/V once; idempotent.

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
        self._check_length(len(self.format.prefix_ids) + len(token_ids), "prefix and document")
        with self._lock:
            document_id = self.documents.register(token_ids)
            self.documents.find(document_id, progress=progress)
            return document_id

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
            admitted = self._admit(documents, question, policy, new_tokens=0)
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
        requests, is_batch = _requests(documents, question)
        sampling = Sampling(temperature, top_k, top_p, seed)
        results: list[Generation] = []
        for event in self._events(requests, max_new_tokens, policy, sampling, stop):
            if isinstance(event, list):
                results = event
            elif on_text is not None:
                on_text(*event)
        return results if is_batch else results[0]

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
        requests = [(documents, question)]
        sampling = Sampling(temperature, top_k, top_p, seed)
        for event in self._events(requests, max_new_tokens, policy, sampling, stop):
            if isinstance(event, tuple):
                yield event[1]

    def explain(
        self, documents: Sequence[str], question: TextOrIds, *, policy: Policy | None = None
    ) -> Explanation:
        """Run a prefill and tell what was reused, recomputed or missed, and why."""
        return self.prefill(documents, question, policy=policy).explain()

    def kv_stats(self) -> dict[str, int]:
        """Pages and bytes of the pool by class, and what the store holds."""
        return dict(self.pool.allocator.stats())

    # --- inside ----------------------------------------------------------------------------------

    def _events(
        self,
        requests: Sequence[tuple[Sequence[str], TextOrIds]],
        max_new_tokens: int,
        policy: Policy | None,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> Iterator[tuple[int, str] | list[Generation]]:
        """Pieces of text as (request, text); the results come last."""
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}")
        stop = [stop] if isinstance(stop, str) else list(stop)
        with self._lock:
            loop = GenerationLoop(
                self._runner, self.tokenizer, max_new_tokens=max_new_tokens, stop=stop
            )
            try:
                for number, (documents, question) in enumerate(requests):
                    admitted = self._admit(documents, question, policy, max_new_tokens)
                    request = Request(number, admitted.session, admitted.rules, admitted.prefill)
                    yield from loop.start(request, sampling)
                yield from loop.run()
                yield loop.results()
            finally:
                loop.release()

    def _check_length(self, num_tokens: int, what: str) -> None:
        if num_tokens > self.decoder.max_context:
            raise InputError(
                f"{what} have {num_tokens} tokens, more than the model's context of "
                f"{self.decoder.max_context}"
            )

    def _admit(
        self,
        documents: Sequence[str],
        question: TextOrIds,
        policy: Policy | None,
        new_tokens: int,
    ) -> _Admitted:
        """Prefill one request into a new session; on any error nothing of it is left behind."""
        policy = policy if policy is not None else self.policy
        if isinstance(documents, str):
            raise InputError("documents must be a list of ids, got one string; write [id]")
        question_ids = self.format.question_ids(question)
        parts = [self.documents.prefix_ids]
        parts += [self.documents.token_ids(document) for document in documents]
        token_ids = np.concatenate([*parts, question_ids])
        self._check_length(len(token_ids) + max(new_tokens - 1, 0), "prompt and new tokens")

        started = time.perf_counter()
        heads = policy.effective_heads(self.heads)
        windows, sinks = heads.rules(self.decoder.sliding_windows)
        rules = HeadRules(heads.is_global, windows, sinks)
        keep = self.documents.keys(documents)
        found: list[Found] = []
        prefix = None
        if policy.reuses_documents:
            prefix = self.documents.prefix(keep)
            found = [self.documents.find(document, keep) for document in documents]
        layout = self._layout(token_ids, prefix, found)
        plan = policy.plan(layout, heads)
        session = self._open_session(prefix, found, layout, plan, rules, new_tokens, keep)
        try:
            counter = FlopCounter(self.decoder.shape)
            logits = self._runner.prefill(
                session,
                Prompt(token_ids, layout, plan),
                rules,
                tail_slots=lambda layer: self.pool.allocator.tail_slots(
                    session, layer, layout.num_tokens - layout.query_begin
                ),
                counter=counter,
            )
            assert logits is not None
            _synchronize(logits)
            ttft_seconds = time.perf_counter() - started
            self.pool.allocator.expire(session)
        except BaseException:
            self.pool.allocator.release_session(session)
            raise
        explanation = self._explain(
            policy, documents, parts, question_ids, found, layout, plan, rules, session
        )
        ledger = self._ledger(counter, len(token_ids), found, documents)
        prefill = Prefill(
            logits=logits,
            token_ids=token_ids.tolist(),
            ttft_seconds=ttft_seconds,
            ledger=ledger,
            kv_bytes=explanation.kv_bytes,
            explanation=explanation,
        )
        return _Admitted(session, rules, prefill)

    def _layout(
        self, token_ids: np.ndarray, prefix: Found | None, found: list[Found]
    ) -> PromptLayout:
        prefix_end = prefix.segment.num_tokens if prefix is not None else 0
        placements = place(prefix_end, [item.segment for item in found])
        query_begin = placements[-1].end if placements else prefix_end
        return PromptLayout(prefix_end, placements, query_begin, len(token_ids))

    def _open_session(
        self,
        prefix: Found | None,
        found: list[Found],
        layout: PromptLayout,
        plan: RecoveryPlan,
        rules: HeadRules,
        new_tokens: int,
        keep: set[str],
    ) -> int:
        """A session with every document attached and room for all that will be written."""
        allocator = self.pool.allocator
        num_query_rows = layout.num_tokens - layout.query_begin
        while True:
            session = allocator.create_session(rules.windows, rules.sinks)
            try:
                for item in ([prefix] if prefix is not None else []) + found:
                    allocator.append_segment(session, item.segment.handle)
                copies = [
                    allocator.append_tokens([session], [num_query_rows], expire_first=False),
                    allocator.make_writable(session, _write_requests(plan, rules.is_global)),
                ]
                # Room for decoding is not taken yet, but must be there.
                room = allocator.fork_session(session)
                try:
                    allocator.append_tokens([room], [new_tokens], expire_first=False)
                finally:
                    allocator.release_session(room)
                for pages in copies:
                    self.pool.copy(pages)
                return session
            except OutOfPages as missing:
                allocator.release_session(session)
                self.documents.make_room(
                    keep, missing, f"a prompt of {layout.num_tokens} tokens"
                )
            except BaseException:
                allocator.release_session(session)
                raise

    def _explain(
        self,
        policy: Policy,
        documents: Sequence[str],
        parts: list[np.ndarray],
        question_ids: np.ndarray,
        found: list[Found],
        layout: PromptLayout,
        plan: RecoveryPlan,
        rules: HeadRules,
        session: int,
    ) -> Explanation:
        num_heads = rules.is_global.size
        reports = []
        position = len(parts[0])
        for number, document in enumerate(documents):
            begin, end = position, position + len(parts[number + 1])
            position = end
            if not found:
                report = DocumentReport(
                    document, begin, end, "not used",
                    f"policy {policy.name} computes every token", 0, 0, num_heads, end - begin,
                )  # fmt: skip
            else:
                item, placement = found[number], layout.documents[number]
                refreshed, rows = _refreshed(plan, rules.is_global, placement.begin, placement.end)
                where = (
                    "at home behind the same prefix, exact"
                    if placement.exact
                    else f"moved by {placement.offset} tokens, keys rotated in place"
                    if placement.offset
                    else "at home, but other documents came before"
                )
                report = DocumentReport(
                    document, begin, end, "computed" if item.computed else "cached",
                    f"{item.reason}; {where}", placement.offset,
                    num_heads - refreshed, refreshed, rows,
                )  # fmt: skip
            reports.append(report)
        allocator = self.pool.allocator
        return Explanation(
            policy=policy.name,
            prefix_tokens=len(parts[0]),
            question_tokens=len(question_ids),
            documents=tuple(reports),
            kv_bytes=allocator.session_pages(session) * self._page_bytes,
            private_kv_bytes=allocator.session_private_pages(session) * self._page_bytes,
        )

    def _ledger(
        self, counter: FlopCounter, num_tokens: int, found: list[Found], documents: Sequence[str]
    ) -> Ledger:
        shape, native = self.decoder.shape, self.decoder.native_windows()
        unique = {item.segment.key: item.segment for item in found}
        return Ledger(
            parts=counter.close(),
            dense_flops=dense_prefill_flops(shape, num_tokens, native),
            prefix_cached_dense_flops=dense_prefill_flops(
                shape, num_tokens, native, cached_tokens=len(self.documents.prefix_ids)
            ),
            offline_flops=sum(segment.offline_flops for segment in unique.values()),
        )


def _requests(
    documents: Any, question: Any
) -> tuple[list[tuple[Sequence[str], TextOrIds]], bool]:
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


def _write_requests(
    plan: RecoveryPlan, is_global: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(head mask, positions) of everything the plan replaces; layers that agree share one."""
    requests: dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]] = {}
    for layer, step in enumerate(plan.layers):
        for positions, heads in ((step.live, is_global[layer]), (step.fresh_local, ~is_global[layer])):
            if not len(positions) or not heads.any():
                continue
            mask, _ = requests.setdefault(
                (id(positions), positions is step.live),
                (np.zeros(is_global.shape, dtype=np.uint8), positions),
            )
            mask[layer] |= heads
    return list(requests.values())


def _refreshed(
    plan: RecoveryPlan, is_global: np.ndarray, begin: int, end: int
) -> tuple[int, int]:
    """(layer, head) pairs refreshed somewhere in [begin, end), and the most rows live in it."""
    heads = rows = 0
    for layer, step in enumerate(plan.layers):
        live = int(((step.live >= begin) & (step.live < end)).sum())
        fresh = bool(((step.fresh_local >= begin) & (step.fresh_local < end)).any())
        rows = max(rows, live)
        heads += int(is_global[layer].sum()) * (live > 0) + int((~is_global[layer]).sum()) * fresh
    return heads, rows


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
