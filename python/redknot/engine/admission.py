"""One request from document ids to a prefilled session: found, placed, planned, admitted, run."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from redknot._memory import OutOfPages
from redknot.cache import out_of_pages
from redknot.cache.page_selection import PageSelector
from redknot.engine.chains import Chain, RecoveredChains, chain_key
from redknot.engine.documents import DocumentCache
from redknot.engine.found import Found, LostPagesError, place
from redknot.engine.report import explain, explain_shared
from redknot.engine.results import Prefill
from redknot.engine.runner import HeadRules, Prompt, Runner
from redknot.engine.segment_tiers import Outline
from redknot.errors import BudgetError, InputError, ModelError
from redknot.heads import HeadMap
from redknot.recovery import (
    FlopCounter,
    Ledger,
    Policy,
    PromptLayout,
    RecoveryPlan,
    dense_prefill_flops,
)

__all__ = ["Admission", "Admitted"]


@dataclass(frozen=True)
class Admitted:
    """A prefilled session that still holds its pages."""

    session: int
    rules: HeadRules
    prefill: Prefill


class Admission:
    """Admits requests of one engine to its pool; what does not fit changes nothing."""

    def __init__(self, runner: Runner, documents: DocumentCache, heads: HeadMap) -> None:
        self._runner = runner
        self._documents = documents
        self._heads = heads
        self.chains = RecoveredChains(runner.pool)

    def check_length(self, num_tokens: int, what: str) -> None:
        """Refuse what is longer than the model's context, with InputError."""
        limit = self._runner.decoder.max_context
        if num_tokens > limit:
            raise InputError(
                f"{what} have {num_tokens} tokens, more than the model's context of {limit}"
            )

    def check(self, documents: Sequence[str], question_ids: np.ndarray, new_tokens: int) -> None:
        """Refuse, with InputError, what can never be admitted; nothing is computed."""
        if isinstance(documents, str):
            raise InputError("documents must be a list of ids, got one string; write [id]")
        if not isinstance(documents, Collection):
            raise InputError(f"documents must be a list of ids, got {documents!r}")
        lengths = [len(self._documents.token_ids(document)) for document in documents]
        num_tokens = len(self._documents.prefix_ids) + sum(lengths) + len(question_ids)
        self.check_length(num_tokens + max(new_tokens - 1, 0), "prompt and new tokens")

    def admit(
        self,
        documents: Sequence[str],
        question_ids: np.ndarray,
        policy: Policy,
        *,
        new_tokens: int,
        copies: int = 1,
        reserved: Mapping[int, int] | None = None,
        share_recovered: bool = False,
    ) -> Admitted:
        """Prefill one request into a new session.

        `new_tokens` more must fit into each of its `copies` (forks to come), and so many as
        `reserved` says into every session that it names, while decoding. With `share_recovered` the
        recovered documents are kept for the next request with the same ones in this order, or taken
        from an earlier one.
        """
        self.check(documents, question_ids, new_tokens)
        started = time.perf_counter()
        options = (policy, new_tokens, copies, reserved or {}, share_recovered, started)
        try:
            return self._admit(documents, question_ids, *options, all_at_once=False)
        except LostPagesError:  # in the middle of it; the document is gone, and computed anew
            return self._admit(documents, question_ids, *options, all_at_once=True)

    def _admit(
        self,
        documents: Sequence[str],
        question_ids: np.ndarray,
        policy: Policy,
        new_tokens: int,
        copies: int,
        reserved: Mapping[int, int],
        share_recovered: bool,
        started: float,
        *,
        all_at_once: bool,
    ) -> Admitted:
        decoder, allocator = self._runner.decoder, self._runner.pool.allocator
        parts = [self._documents.prefix_ids]
        parts += [self._documents.token_ids(document) for document in documents]
        token_ids = np.concatenate([*parts, question_ids])
        heads = Policy.checked(policy).effective_heads(self._heads)
        windows, sinks = heads.rules(decoder.sliding_windows)
        rules = HeadRules(heads.is_global, windows, sinks, PageSelector.of(heads))
        # What the policy does not read from the cache may go.
        keep = self._documents.keys(documents) if policy.reuses_documents else set()
        chain_name = None
        if share_recovered and policy.reuses_documents and documents:
            chain_name = chain_key(self._documents.chain(documents), policy, heads)
            chain = self.chains.find(chain_name)
            if chain is not None:
                growth = [len(question_ids) + new_tokens] * copies
                return self._continue(chain, token_ids, rules, reserved, growth, started)
        prefix: Found | None = None
        found: list[Found] = []
        reads_later = False
        prefix_end = len(self._documents.prefix_ids) if policy.reuses_documents else 0
        outlines = [self._documents.outline(d) for d in documents if policy.reuses_documents]
        layout = _layout(len(token_ids), prefix_end, outlines)
        plan = policy.plan(layout, self._heads)
        if policy.reuses_documents:
            entry = policy.entry_layer(self._heads)
            needs = self._documents.read_ahead(
                documents, entry, plan, layout, rules, all_at_once=all_at_once
            )
            prefix = self._documents.prefix(keep)
            found = [
                self._documents.find(document, keep, hidden_layer=entry, need=need)
                for document, need in zip(documents, needs, strict=True)
            ]
            reads_later = any(need.later is not None for need in needs)
        attached = [item.segment.handle for item in ([prefix] if prefix else []) + found]
        session = self._open_session(
            attached, layout, plan, rules, keep, reserved, [new_tokens] * copies
        )
        chain_session = None

        picks: dict[int, np.ndarray] = {}

        def read_picked(chosen_from: np.ndarray, picked: np.ndarray) -> None:
            picks[id(chosen_from)] = picked
            found[:] = self._documents.read_picked(found, session, picks, plan, layout, rules)

        try:
            counter = FlopCounter(decoder.shape)
            logits, trace = self._runner.prefill(
                session,
                Prompt(token_ids, layout, plan, [item.segment.hidden for item in found]),
                rules,
                tail_slots=lambda layer: allocator.tail_slots(
                    session, layer, layout.num_tokens - layout.query_begin
                ),
                counter=counter,
                on_pick=read_picked if reads_later else None,
            )
            if logits.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
            ttft_seconds = time.perf_counter() - started
            _check_logits(logits)
            if chain_name is not None:
                chain_session = allocator.fork_session(session)
            allocator.expire(session)
            explanation = explain(
                policy.name,
                documents,
                [len(part) for part in parts],
                found,
                layout,
                plan.reason,
                trace,
                rules,
                kv_pages=allocator.session_pages(session),
                private_kv_pages=allocator.session_private_pages(session),
                page_bytes=self._runner.pool.page_bytes,
            )
        except BaseException:
            for opened in (session, chain_session):
                if opened is not None:
                    allocator.release_session(opened)
            raise
        ledger = self._ledger(counter, len(token_ids), _offline_flops(found))
        if chain_name is not None and chain_session is not None:
            allocator.truncate(chain_session, layout.query_begin)
            allocator.expire(chain_session)
            chain = Chain(chain_session, layout.query_begin, explanation, ledger.offline_flops)
            self.chains.keep(chain_name, chain)
        prefill = Prefill(
            logits=logits,
            token_ids=token_ids.tolist(),
            ttft_seconds=ttft_seconds,
            ledger=ledger,
            kv_bytes=explanation.kv_bytes,
            explanation=explanation,
        )
        return Admitted(session, rules, prefill)

    def _continue(
        self,
        chain: Chain,
        token_ids: np.ndarray,
        rules: HeadRules,
        reserved: Mapping[int, int],
        growth: Sequence[int],
        started: float,
    ) -> Admitted:
        """Prefill a question behind documents that an earlier request has recovered."""
        decoder, allocator = self._runner.decoder, self._runner.pool.allocator
        question_ids = token_ids[chain.num_tokens :]
        while True:
            session = allocator.fork_session(chain.session)
            try:
                self._check_room(reserved, session, growth)
                logits = self._runner.extend(
                    [session],
                    torch.as_tensor(question_ids, device=decoder.device),
                    [len(question_ids)],
                    [rules],
                )[0]
                _check_logits(logits)
                break
            except OutOfPages as missing:
                allocator.release_session(session)
                what = f"a question of {len(question_ids)} tokens"
                self.make_room((), missing, what, keep_chain=chain)
            except BaseException:
                allocator.release_session(session)
                raise
        if logits.device.type == "cuda":
            torch.cuda.synchronize(logits.device)
        ttft_seconds = time.perf_counter() - started
        counter = FlopCounter(decoder.shape)
        positions = np.arange(chain.num_tokens, len(token_ids))
        for windows, sinks in zip(rules.windows, rules.sinks, strict=True):
            counter.query_and_output(len(positions))
            counter.key_value(len(positions), decoder.shape.num_kv_heads)
            counter.rotation(
                len(positions) * (decoder.shape.num_q_heads + decoder.shape.num_kv_heads)
            )
            counter.attention(positions, windows, sinks)
            counter.ffn(len(positions))
        counter.lm_head()
        page_bytes = self._runner.pool.page_bytes
        explanation = explain_shared(
            chain.explanation,
            question_tokens=len(positions),
            num_heads=rules.is_global.size,
            kv_bytes=allocator.session_pages(session) * page_bytes,
            private_kv_bytes=allocator.session_private_pages(session) * page_bytes,
        )
        prefill = Prefill(
            logits=logits,
            token_ids=token_ids.tolist(),
            ttft_seconds=ttft_seconds,
            ledger=self._ledger(counter, len(token_ids), chain.offline_flops),
            kv_bytes=explanation.kv_bytes,
            explanation=explanation,
        )
        return Admitted(session, rules, prefill)

    def make_room(
        self,
        keep: Collection[str],
        missing: OutOfPages,
        what: str,
        *,
        keep_chain: Chain | None = None,
    ) -> None:
        """Evict one chain or segment that the request does not need, or raise BudgetError.

        Chains that nobody has shared go first, then documents, then the other chains.
        """
        if self.chains.evict_one(shared_too=False, keep=keep_chain):
            return
        try:
            self._documents.make_room(keep, missing, what)
        except BudgetError:
            if not self.chains.evict_one(shared_too=True, keep=keep_chain):
                raise

    def _open_session(
        self,
        attached: Sequence[int],
        layout: PromptLayout,
        plan: RecoveryPlan,
        rules: HeadRules,
        keep: set[str],
        reserved: Mapping[int, int],
        growth: Sequence[int],
    ) -> int:
        """A session with every segment attached and room for all that will be written."""
        pool = self._runner.pool
        allocator = pool.allocator
        num_query_rows = layout.num_tokens - layout.query_begin
        while True:
            session = allocator.create_session(rules.windows, rules.sinks)
            try:
                for handle in attached:
                    allocator.append_segment(session, handle)
                copies = [
                    allocator.append_tokens([session], [num_query_rows], expire_first=False),
                    allocator.make_writable(
                        session,
                        _write_requests(plan, rules.is_global),
                        # What is written is known only later, or what lies there is read.
                        keep_contents=plan.picks,
                    ),
                ]
                self._check_room(reserved, session, growth)
                for pages in copies:
                    pool.copy(pages)
                return session
            except OutOfPages as missing:
                allocator.release_session(session)
                self.make_room(keep, missing, f"a prompt of {layout.num_tokens} tokens")
            except BaseException:
                allocator.release_session(session)
                raise

    def check_swap_in(self, session: int, reserved: Mapping[int, int], new_tokens: int) -> None:
        """Raise OutOfPages unless a swapped session can come back and all of them grow."""
        self._check_room(reserved, session, [new_tokens])

    def _check_room(self, reserved: Mapping[int, int], session: int, growth: Sequence[int]) -> None:
        """Raise OutOfPages unless all sessions could grow so; takes nothing.

        By as many tokens as `reserved` says, and `session` and forks of it by those of `growth`.
        """
        allocator = self._runner.pool.allocator
        sessions = [*reserved, *[session] * len(growth)]
        needed = allocator.growth_pages(sessions, [*reserved.values(), *growth])
        needed += allocator.session_swapped_pages(session)
        free = allocator.free_pages()
        if needed > free:
            raise out_of_pages(needed, free)

    def _ledger(self, counter: FlopCounter, num_tokens: int, offline_flops: float) -> Ledger:
        decoder = self._runner.decoder
        native = decoder.native_windows()
        return Ledger(
            parts=counter.close(),
            dense_flops=dense_prefill_flops(decoder.shape, num_tokens, native),
            prefix_cached_dense_flops=dense_prefill_flops(
                decoder.shape, num_tokens, native, cached_tokens=len(self._documents.prefix_ids)
            ),
            offline_flops=offline_flops,
        )


def _check_logits(logits: torch.Tensor) -> None:
    """Refuse to answer from logits that are no numbers, with ModelError."""
    if bool(logits.isnan().any()):
        raise ModelError(
            "the model's logits are NaN: one of its weights is, or a value is too large for "
            f"{logits.dtype}"
        )


def _offline_flops(found: Sequence[Found]) -> float:
    unique = {item.segment.key: item.segment for item in found}
    return sum(segment.offline_flops for segment in unique.values())


def _layout(num_tokens: int, prefix_end: int, outlines: Sequence[Outline]) -> PromptLayout:
    placements = place(prefix_end, outlines)
    query_begin = placements[-1].end if placements else prefix_end
    return PromptLayout(prefix_end, placements, query_begin, num_tokens)


def _write_requests(
    plan: RecoveryPlan, is_global: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(head mask, positions) of everything the plan replaces; layers that agree share one."""
    requests: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for layer, step in enumerate(plan.layers):
        for positions, heads in (
            (step.fresh, is_global[layer]),
            (step.fresh_local, ~is_global[layer]),
        ):
            if not len(positions) or not heads.any():
                continue
            mask, _ = requests.setdefault(
                id(positions), (np.zeros(is_global.shape, dtype=np.uint8), positions)
            )
            mask[layer] |= heads
    return list(requests.values())
