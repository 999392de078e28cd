"""One prefill over reused documents: executes a recovery plan layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redknot import ops
from redknot.cache import KVPool
from redknot.cache.page_selection import PageSelector
from redknot.engine.live_rows import LiveRows, Prompt
from redknot.engine.signals import (
    GlobalRows,
    foreign_part,
    kv_shift,
    select_rows,
    weight_read,
)
from redknot.models.decoder import Decoder
from redknot.recovery import FfnRule, FlopCounter, LayerPlan, LookAhead, Pick

__all__ = ["HeadRules", "LayerTrace", "RecoveryPass", "TokenSlots"]

# Slots [num_rows, num_kv_heads] of the rows that a pass computes, by layer.
TokenSlots = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class HeadRules:
    """What each head of a session is and sees: matrices [num_layers, num_kv_heads]."""

    is_global: np.ndarray
    windows: np.ndarray
    sinks: np.ndarray
    selector: PageSelector | None = None  # which pages retrieval heads read while decoding


@dataclass(frozen=True)
class LayerTrace:
    """Document rows of one layer as they really were: positions, int64 on the device."""

    live: Tensor
    fresh: Tensor
    fresh_local: Tensor


class RecoveryPass:
    """The state of one prefill.

    The session's rows hold all tokens already (attached documents, room for the query), and pages
    to be written are private.

    Parameters
    ----------
    decoder, pool, session
        What computes, and where K and V lie.
    prompt : Prompt
        Tokens, layout and plan.
    rules : HeadRules
        Of the session.
    tail_slots : callable
        Slots [num_query_rows, num_kv_heads] of the query's rows, by layer.
    counter : FlopCounter
        Told of everything that is computed.
    on_pick : callable, optional
        Called with the plan's array that a pick chose from and the positions that it kept, int64
        ascending, before they attend.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        session: int,
        prompt: Prompt,
        rules: HeadRules,
        tail_slots: TokenSlots,
        counter: FlopCounter,
        on_pick: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> None:
        self._on_pick = on_pick
        self._decoder, self._pool, self._session = decoder, pool, session
        self._prompt, self._rules = prompt, rules
        self._tail_slots, self._counter = tail_slots, counter
        self._rows = LiveRows(prompt, decoder.device)
        self._windows, self._sinks = self._tensor(rules.windows), self._tensor(rules.sinks)
        self._heads = [np.flatnonzero(row) for row in rules.is_global]
        self._forced: tuple[np.ndarray, Tensor] | None = None
        self.trace: list[LayerTrace] = []

    def _tensor(self, array: np.ndarray, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=self._decoder.device)

    def run(self) -> Tensor:
        """Compute the live rows of every layer and write the K/V that the plan refreshes.

        Returns the logits [vocab_size] of the last row; `trace` then says which rows lived.
        """
        decoder, rows, counter = self._decoder, self._rows, self._counter
        token_ids = self._tensor(self._prompt.token_ids, torch.int64)
        layers = self._prompt.plan.layers
        if self._prompt.plan.ahead is not None:
            self._look_ahead(self._prompt.plan.ahead)
            rows.begin(layers[0].present)
        hidden = decoder.embed(token_ids[rows.positions])
        asked = [n for n, step in enumerate(layers) if step.ffn and step.ffn.signal == "foreign"]
        last_foreign = max(asked, default=-1)
        for layer, step in enumerate(layers):
            hidden = rows.move(step.present, hidden)
            normed = decoder.attention_norm(layer, hidden)
            fresh, fresh_local = rows.now(step.fresh), rows.now(step.fresh_local)
            shift = self._refresh_kv(layer, step, normed)
            if step.pick is not None:
                self._pick(layer, normed, step.pick, step.present, shift)
            hidden, normed = rows.keep(step.live, hidden, normed)
            self.trace.append(LayerTrace(rows.documents, fresh, fresh_local))

            q = decoder.query(layer, normed, rows.q_positions)
            wants_foreign = layer <= last_foreign
            out, lse = self._pool.attend_rows(
                q,
                *self._pool.allocator.rows([self._session], layer),
                cu_seqlens_q=rows.cu_seqlens_q,
                q_positions=rows.q_positions,
                row_window=self._windows[layer],
                row_sink=self._sinks[layer],
                inv_freq=decoder.inv_freq,
                softmax_scale=decoder.softmax_scale,
                softcap=decoder.softcap,
                return_lse=wants_foreign,
            )
            hidden = decoder.add_attention(layer, hidden, out)
            counter.query_and_output(len(q))
            counter.rotation(len(q) * decoder.shape.num_q_heads)
            counter.attention(rows.positions, self._rules.windows[layer], self._rules.sinks[layer])
            if wants_foreign:
                self._add_foreign(layer, q, out, lse)
            hidden = self._add_ffn(layer, step.ffn, hidden, out)
        counter.lm_head()
        return decoder.logits(hidden[-1:])[0]

    # --- K and V ---------------------------------------------------------------------------------

    def _refresh_kv(self, layer: int, step: LayerPlan, normed: Tensor) -> Tensor | None:
        """Write the K/V of fresh rows and of the query's.

        Returns how far they moved, [len(fresh)], if the layer picks by that.
        """
        num_heads = self._decoder.shape.num_kv_heads
        everything, global_heads = np.arange(num_heads), self._heads[layer]
        if step.fresh is step.fresh_local or len(global_heads) == num_heads:
            return self._write_kv(layer, step, step.fresh, everything, normed)
        if not len(global_heads):
            return self._write_kv(layer, step, step.fresh_local, everything, normed)
        local_heads = np.flatnonzero(~self._rules.is_global[layer])
        shift = self._write_kv(layer, step, step.fresh, global_heads, normed)
        self._write_kv(layer, step, step.fresh_local, local_heads, normed)
        return shift

    def _write_kv(
        self, layer: int, step: LayerPlan, fresh: np.ndarray, heads: np.ndarray, normed: Tensor
    ) -> Tensor | None:
        """Compute and write some heads' K/V of the rows `fresh` and the query's."""
        rows, pool, counter = self._rows, self._pool, self._counter
        all_heads = len(heads) == self._decoder.shape.num_kv_heads
        tail = self._tail_slots(layer)
        slots = self._tensor(tail if all_heads else tail.take(heads, 1), torch.int64)
        documents = rows.now(fresh)
        if len(documents):
            planned = pool.allocator.position_slots(self._session, layer, fresh)
            own = self._tensor(planned if all_heads else planned.take(heads, 1), torch.int64)
            rank = rows.rank(fresh, documents)
            slots = torch.cat([own if rank is None else own[rank], slots])
        positions, num_query = rows.key_positions[rows.positions], len(tail)
        if len(documents) < rows.num_documents:
            index = torch.searchsorted(rows.documents, documents)
            tail_index = torch.arange(rows.num_documents, len(normed), device=index.device)
            index = torch.cat([index, tail_index])
            normed, positions = normed[index], positions[index]
        k, v = self._decoder.key_value(layer, normed, positions, tuple(heads.tolist()))
        shift = None
        if step.pick is not None and step.pick.by == "kv_shift":
            shift = kv_shift(k[:-num_query], v[:-num_query], *pool.read(slots[:-num_query]))
            counter.kv_shift(len(documents), len(heads))
        pool.write(k, v, slots)
        exact = self._decoder.computes_columns(layer, "k_proj", "v_proj")
        counter.key_value(len(normed), len(heads) if exact else self._decoder.shape.num_kv_heads)
        counter.rotation(len(normed) * len(heads))
        return shift

    # --- what makes a row important --------------------------------------------------------------

    def _global_rows(self, layer: int, heads: tuple[int, ...] | None = None) -> GlobalRows:
        chosen = self._heads[layer] if heads is None else np.array(heads)
        return GlobalRows.of(self._pool, self._session, layer, chosen, self._prompt.layout)

    def _look_ahead(self, ahead: LookAhead) -> None:
        """Pick rows by what a layer will bring to them, as far as stored hidden states tell."""
        like = self._decoder.embed(self._rows.positions[:0])
        stored = self._prompt.hidden_of(ahead.rows, like)
        normed = self._decoder.attention_norm(ahead.layer, stored)
        self._pick(ahead.layer, normed, ahead.pick, ahead.rows)

    def _pick(
        self,
        layer: int,
        normed: Tensor,
        pick: Pick,
        among: np.ndarray,
        shift: Tensor | None = None,
    ) -> None:
        """Keep some of the set `among`, which is carried: by `shift`, or by what heads bring."""
        read_by = None
        if pick.by != "kv_shift":
            shift, read_by = self._probe(layer, normed, pick, among)
        assert shift is not None
        self._rows.pick(pick, among, shift, read_by)
        if self._on_pick is not None:
            self._on_pick(among, self._rows.now(among).cpu().numpy())

    def _probe(
        self, layer: int, normed: Tensor, pick: Pick, among: np.ndarray
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Importance of every document row, by the attention of global heads alone.

        Also what some of the rows, given by index, read of each row.
        """
        rows, decoder, counter = self._rows, self._decoder, self._counter
        pages = self._global_rows(layer, pick.heads)
        num_rows, positions = rows.num_documents, rows.q_positions[: rows.num_documents]
        q = decoder.query(layer, normed[:num_rows], positions, pages.heads)
        out, lse = self._attend_global(
            layer,
            pages.heads,
            q,
            *pages.everything(),
            self._tensor(np.array([0, num_rows])),
        )
        counter.probe(
            rows.documents,
            self._rules.windows[layer][list(pages.heads)],
            columns=len(pages.heads)
            if decoder.computes_columns(layer, "q_proj")
            else decoder.shape.num_kv_heads,
        )

        def read_by(chosen: Tensor) -> Tensor:
            slots = self._pool.allocator.position_slots(self._session, layer, among)
            k, _ = self._pool.read(self._tensor(slots[:, list(pages.heads)], torch.int64))
            home = rows.key_positions[rows.documents]
            k = ops.rope_realign(k, positions - home, decoder.inv_freq)
            counter.reading(len(chosen), num_rows, len(pages.heads))
            return weight_read(
                q[chosen],
                lse[:, chosen],
                k,
                positions[chosen],
                positions,
                int(self._rules.windows[layer, pages.heads[0]]),  # the same for all global heads
                decoder.softmax_scale,
                decoder.softcap,
            )

        if pick.by == "attention_norm":
            return ops.token_importance(out), read_by
        return self._foreign(layer, pages, q, out, lse), read_by

    def _foreign(
        self, layer: int, pages: GlobalRows, q: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """What the global heads brought to the document rows from other segments, [num_rows]."""
        rows, layout = self._rows, self._prompt.layout
        ends = self._tensor(np.array([document.end for document in layout.documents]), torch.int64)
        bounds = torch.searchsorted(rows.documents, ends).int()
        bounds = torch.cat([bounds.new_zeros(1), bounds])
        own = self._attend_global(layer, pages.heads, q, *pages.own(), bounds)
        self._counter.own_attention(
            rows.documents, self._rules.windows[layer][list(pages.heads)], layout
        )
        return foreign_part(out, lse, *own)

    def _attend_global(
        self,
        layer: int,
        heads: tuple[int, ...],
        q: Tensor,
        row_indptr: np.ndarray,
        page_refs: np.ndarray,
        cu_seqlens_q: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of some global heads of the layer for the document rows."""
        chosen = list(heads)
        num_seqs = len(cu_seqlens_q) - 1
        return self._pool.attend_rows(
            q,
            row_indptr,
            page_refs,
            cu_seqlens_q=cu_seqlens_q,
            q_positions=self._rows.q_positions[: len(q)],
            row_window=self._tensor(np.tile(self._rules.windows[layer][chosen], num_seqs)),
            row_sink=self._tensor(np.tile(self._rules.sinks[layer][chosen], num_seqs)),
            inv_freq=self._decoder.inv_freq,
            softmax_scale=self._decoder.softmax_scale,
            softcap=self._decoder.softcap,
            return_lse=True,
        )

    def _add_foreign(self, layer: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add up what this layer's global heads, if it has any, brought to the live rows."""
        rows, heads = self._rows, self._heads[layer]
        if not len(heads) or not rows.num_documents:
            return
        group = self._decoder.shape.group_size
        index = np.concatenate([np.arange(h * group, (h + 1) * group) for h in heads])
        columns, num_rows = self._tensor(index, torch.int64), rows.num_documents
        brought = self._foreign(
            layer,
            self._global_rows(layer),
            q[:num_rows, columns],
            out[:num_rows, columns],
            lse[columns, :num_rows],
        )
        if rows.foreign is None:
            rows.foreign = brought.new_zeros(len(rows.positions))
        rows.foreign[:num_rows] += brought

    # --- FFN -------------------------------------------------------------------------------------

    def _add_ffn(self, layer: int, rule: FfnRule | None, hidden: Tensor, out: Tensor) -> Tensor:
        """Add the FFN of the rows that the rule selects; of all without one."""
        rows, decoder, counter = self._rows, self._decoder, self._counter
        if rule is None or (rule.signal == "foreign" and rows.foreign is None):
            counter.ffn(len(hidden))
            return decoder.add_ffn(layer, hidden)
        if rule.signal == "random":
            generator = torch.Generator().manual_seed(rule.seed)
            importance = torch.rand(len(hidden), generator=generator).to(hidden.device)
        elif rule.signal == "foreign":
            assert rows.foreign is not None
            importance = rows.foreign
        else:
            importance = ops.token_importance(out)
            counter.selection(len(hidden))
        if self._forced is None or self._forced[0] is not rule.forced_positions:
            forced = torch.zeros(len(rows.key_positions), dtype=torch.bool)
            forced[torch.from_numpy(rule.forced_positions)] = True
            self._forced = (rule.forced_positions, forced.to(hidden.device))
        indices, count = select_rows(importance, rule, self._forced[1][rows.positions])
        counter.ffn_later(count)
        return decoder.add_sparse_ffn(layer, hidden, indices, count)
