"""One request from document ids to a prefilled session: found, placed, planned, admitted, run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from redknot._memory import OutOfPages
from redknot.engine.documents import DocumentCache, Found, place
from redknot.engine.report import explain
from redknot.engine.results import Prefill
from redknot.engine.runner import HeadRules, Prompt, Runner
from redknot.errors import InputError
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

    def check_length(self, num_tokens: int, what: str) -> None:
        """Refuse what is longer than the model's context, with InputError."""
        limit = self._runner.decoder.max_context
        if num_tokens > limit:
            raise InputError(
                f"{what} have {num_tokens} tokens, more than the model's context of {limit}"
            )

    def admit(
        self,
        documents: Sequence[str],
        question_ids: np.ndarray,
        policy: Policy,
        *,
        new_tokens: int,
        running: Sequence[int] = (),
    ) -> Admitted:
        """Prefill one request into a new session.

        `new_tokens` more must fit into it, and into every session in `running`, while decoding.
        """
        if isinstance(documents, str):
            raise InputError("documents must be a list of ids, got one string; write [id]")
        decoder, allocator = self._runner.decoder, self._runner.pool.allocator
        parts = [self._documents.prefix_ids]
        parts += [self._documents.token_ids(document) for document in documents]
        token_ids = np.concatenate([*parts, question_ids])
        self.check_length(len(token_ids) + max(new_tokens - 1, 0), "prompt and new tokens")

        started = time.perf_counter()
        heads = policy.effective_heads(self._heads)
        windows, sinks = heads.rules(decoder.sliding_windows)
        rules = HeadRules(heads.is_global, windows, sinks)
        keep = self._documents.keys(documents)
        prefix: Found | None = None
        found: list[Found] = []
        if policy.reuses_documents:
            prefix = self._documents.prefix(keep)
            entry = policy.entry_layer(self._heads)
            found = [
                self._documents.find(document, keep, hidden_layer=entry) for document in documents
            ]
        layout = _layout(token_ids, prefix, found)
        plan = policy.plan(layout, self._heads)
        attached = [item.segment.handle for item in ([prefix] if prefix else []) + found]
        session = self._open_session(
            attached, layout, plan, rules, keep, running=running, new_tokens=new_tokens
        )
        try:
            counter = FlopCounter(decoder.shape)
            logits = self._runner.prefill(
                session,
                Prompt(token_ids, layout, plan),
                rules,
                tail_slots=lambda layer: allocator.tail_slots(
                    session, layer, layout.num_tokens - layout.query_begin
                ),
                counter=counter,
            )
            if logits.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
            ttft_seconds = time.perf_counter() - started
            allocator.expire(session)
            explanation = explain(
                policy.name,
                documents,
                [len(part) for part in parts],
                found,
                layout,
                plan,
                rules,
                kv_pages=allocator.session_pages(session),
                private_kv_pages=allocator.session_private_pages(session),
                page_bytes=self._runner.pool.page_bytes,
            )
        except BaseException:
            allocator.release_session(session)
            raise
        prefill = Prefill(
            logits=logits,
            token_ids=token_ids.tolist(),
            ttft_seconds=ttft_seconds,
            ledger=self._ledger(counter, len(token_ids), found),
            kv_bytes=explanation.kv_bytes,
            explanation=explanation,
        )
        return Admitted(session, rules, prefill)

    def _open_session(
        self,
        attached: Sequence[int],
        layout: PromptLayout,
        plan: RecoveryPlan,
        rules: HeadRules,
        keep: set[str],
        *,
        running: Sequence[int],
        new_tokens: int,
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
                    allocator.make_writable(session, _write_requests(plan, rules.is_global)),
                ]
                self._check_room([*running, session], new_tokens)
                for pages in copies:
                    pool.copy(pages)
                return session
            except OutOfPages as missing:
                allocator.release_session(session)
                self._documents.make_room(keep, missing, f"a prompt of {layout.num_tokens} tokens")
            except BaseException:
                allocator.release_session(session)
                raise

    def _check_room(self, sessions: Sequence[int], new_tokens: int) -> None:
        """Raise OutOfPages unless all sessions could grow by `new_tokens`; takes nothing."""
        allocator = self._runner.pool.allocator
        forks = [allocator.fork_session(session) for session in sessions]
        try:
            allocator.append_tokens(forks, [new_tokens] * len(forks), expire_first=False)
        finally:
            for fork in forks:
                allocator.release_session(fork)

    def _ledger(self, counter: FlopCounter, num_tokens: int, found: list[Found]) -> Ledger:
        decoder = self._runner.decoder
        native = decoder.native_windows()
        unique = {item.segment.key: item.segment for item in found}
        return Ledger(
            parts=counter.close(),
            dense_flops=dense_prefill_flops(decoder.shape, num_tokens, native),
            prefix_cached_dense_flops=dense_prefill_flops(
                decoder.shape, num_tokens, native, cached_tokens=len(self._documents.prefix_ids)
            ),
            offline_flops=sum(segment.offline_flops for segment in unique.values()),
        )


def _layout(token_ids: np.ndarray, prefix: Found | None, found: list[Found]) -> PromptLayout:
    prefix_end = prefix.segment.num_tokens if prefix is not None else 0
    placements = place(prefix_end, [item.segment for item in found])
    query_begin = placements[-1].end if placements else prefix_end
    return PromptLayout(prefix_end, placements, query_begin, len(token_ids))


def _write_requests(
    plan: RecoveryPlan, is_global: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(head mask, positions) of everything the plan replaces; layers that agree share one."""
    requests: dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]] = {}
    for layer, step in enumerate(plan.layers):
        for positions, heads in (
            (step.live, is_global[layer]),
            (step.fresh_local, ~is_global[layer]),
        ):
            if not len(positions) or not heads.any():
                continue
            mask, _ = requests.setdefault(
                (id(positions), positions is step.live),
                (np.zeros(is_global.shape, dtype=np.uint8), positions),
            )
            mask[layer] |= heads
    return list(requests.values())
