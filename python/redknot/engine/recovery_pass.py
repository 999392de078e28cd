"""One prefill over reused documents: executes a recovery plan layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from redknot import ops
from redknot.cache import KVPool
from redknot.cache.page_selection import PageSelector
from redknot.engine.live_rows import LiveRows, Prompt, part_of
from redknot.engine.signals import (
    GlobalRows,
    foreign_part,
    kv_shift,
    select_rows,
    weight_read,
)
from redknot.models.decoder import Decoder
from redknot.recovery import FfnRule, FlopCounter, LayerPlan, Pick

__all__ = ["HeadRules", "LayerTrace", "RecoveryPass", "TokenSlots"]

# Slots [num_rows, num_kv_heads] of the rows that a pass computes, by layer.
TokenSlots = Callable[[int], np.ndarray]
# Normed hidden states of some of the carried rows.
_Normed: TypeAlias = Callable[["slice | Tensor"], Tensor]
# Bytes of hidden states at most that pass projections and attention at once on a CPU: rows enough
# for the GEMMs, and memory so little that the allocators keep it for the next chunk.
_CHUNK_BYTES = 24 << 20
# Rows of a chunk are whole tiles of the attention.
_TILE_ROWS = 256


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


def _before_pick(step: LayerPlan) -> np.ndarray:
    """Document rows that a layer's K and V are computed of, before its pick lets others enter."""
    by_heads = step.pick is not None and step.pick.by != "kv_shift"
    return step.fresh if by_heads else step.present


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
        self._rows = LiveRows(prompt, decoder)
        self._windows = self._tensor(rules.windows).unbind()
        self._sinks = self._tensor(rules.sinks).unbind()
        self._heads = [np.flatnonzero(row) for row in rules.is_global]
        self._forced: tuple[np.ndarray, Tensor] | None = None
        self._most_rows = sys.maxsize  # of a chunk
        if decoder.device.type == "cpu":
            row_bytes = decoder.shape.hidden_dim * decoder.dtype.itemsize
            self._most_rows = max(_CHUNK_BYTES // row_bytes, _TILE_ROWS)
        self.trace: list[LayerTrace] = []

    def _tensor(self, array: np.ndarray, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=self._decoder.device)

    def run(self) -> Tensor:
        """Compute the live rows of every layer and write the K/V that the plan refreshes.

        Returns the logits [vocab_size] of the last row; `trace` then says which rows lived.
        """
        rows, plan, ahead = self._rows, self._prompt.plan, self._prompt.plan.ahead
        if ahead is not None:
            self._pick(ahead.layer, ahead.pick, ahead.rows)
        hidden = rows.begin(_before_pick(plan.layers[0]))
        asked = [n for n, s in enumerate(plan.layers) if s.ffn and s.ffn.signal == "foreign"]
        last_foreign = max(asked, default=-1)
        for layer, step in enumerate(plan.layers):
            hidden = rows.move(_before_pick(step), hidden, layer)
            normed = self._normed(layer, hidden)
            fresh, fresh_local = rows.now(step.fresh), rows.now(step.fresh_local)
            shift = self._refresh_kv(layer, step, normed)
            if step.pick is not None:
                self._pick(layer, step.pick, step.present, shift)
            live = rows.move(step.live, hidden, layer)
            if live is not hidden:
                hidden, normed = live, self._normed(layer, live)
            self.trace.append(LayerTrace(rows.documents, fresh, fresh_local))
            norms = self._attend(layer, step.ffn, hidden, normed, layer <= last_foreign)
            hidden = self._add_ffn(layer, step.ffn, hidden, norms)
        self._counter.lm_head()
        return self._decoder.logits(hidden[-1:])[0]

    def _chunks(self, num_rows: int) -> list[slice]:
        """Rows that pass projections and attention at once, evenly split."""
        if num_rows <= self._most_rows:
            return [slice(0, num_rows)]
        num_chunks = -(-num_rows // self._most_rows)
        size = -(-num_rows // (num_chunks * _TILE_ROWS)) * _TILE_ROWS
        return [slice(begin, begin + size) for begin in range(0, num_rows, size)]

    def _normed(self, layer: int, hidden: Tensor) -> _Normed:
        """The norm before a layer's projections, of some rows; once where all are one chunk."""
        if len(hidden) <= self._most_rows:
            return self._decoder.attention_norm(layer, hidden).__getitem__
        return lambda index: self._decoder.attention_norm(layer, hidden[index])

    def _attend(
        self,
        layer: int,
        rule: FfnRule | None,
        hidden: Tensor,
        normed: _Normed,
        wants_foreign: bool,
    ) -> Tensor | None:
        """Add the attention of the live rows to `hidden`, in place.

        Returns the norms [num_rows] of its output, if the layer's rule asks for them.
        """
        decoder, rows, counter = self._decoder, self._rows, self._counter
        row_indptr, page_refs = self._pool.allocator.rows([self._session], layer)
        norms = []
        for chunk in self._chunks(len(hidden)):
            own, positions = hidden[chunk], rows.q_positions[chunk]
            q = decoder.query(layer, normed(chunk), positions)
            out, lse = self._pool.attend_rows(
                q,
                row_indptr,
                page_refs,
                cu_seqlens_q=self._tensor(np.array([0, len(q)])),
                q_positions=positions,
                row_window=self._windows[layer],
                row_sink=self._sinks[layer],
                inv_freq=decoder.inv_freq,
                softmax_scale=decoder.softmax_scale,
                softcap=decoder.softcap,
                return_lse=wants_foreign,
            )
            decoder.add_attention(layer, own, out, out=own)
            if wants_foreign:
                self._add_foreign(layer, chunk, q, out, lse)
            if rule is not None and rule.signal == "attention_norm":
                norms.append(ops.token_importance(out))
        counter.query_and_output(len(hidden))
        counter.rotation(len(hidden) * decoder.shape.num_q_heads)
        counter.attention(rows.positions, self._rules.windows[layer], self._rules.sinks[layer])
        return torch.cat(norms) if norms else None

    # --- K and V ---------------------------------------------------------------------------------

    def _refresh_kv(self, layer: int, step: LayerPlan, normed: _Normed) -> Tensor | None:
        """Write the K/V of fresh rows and of the query's.

        Returns how far they moved, [len(fresh)], if the layer picks by that.
        """
        num_heads, global_heads = self._decoder.shape.num_kv_heads, self._heads[layer]
        if step.fresh is step.fresh_local or len(global_heads) in (0, num_heads):
            fresh = step.fresh if len(global_heads) else step.fresh_local
            return self._write_kv(layer, step, fresh, np.arange(num_heads), normed)
        local_heads = np.flatnonzero(~self._rules.is_global[layer])
        shift = self._write_kv(layer, step, step.fresh, global_heads, normed)
        self._write_kv(layer, step, step.fresh_local, local_heads, normed)
        return shift

    def _write_kv(
        self, layer: int, step: LayerPlan, fresh: np.ndarray, heads: np.ndarray, normed: _Normed
    ) -> Tensor | None:
        """Compute and write some heads' K/V of the rows `fresh` and the query's."""
        rows, pool, counter, decoder = self._rows, self._pool, self._counter, self._decoder
        all_heads = len(heads) == decoder.shape.num_kv_heads
        tail = self._tail_slots(layer)
        slots = self._tensor(tail if all_heads else tail.take(heads, 1), torch.int64)
        documents = rows.now(fresh)
        if len(documents):
            planned = pool.allocator.position_slots(self._session, layer, fresh)
            of_set = self._tensor(planned if all_heads else planned.take(heads, 1), torch.int64)
            rank = rows.rank(fresh)
            slots = torch.cat([of_set if rank is None else of_set[rank], slots])
        index = rows.index_of(documents)
        positions = rows.home_positions[index]
        shifts, wants_shift = [], step.pick is not None and step.pick.by == "kv_shift"
        for chunk in self._chunks(len(slots)):
            own = normed(part_of(index, chunk))
            k, v = decoder.key_value(layer, own, positions[chunk], tuple(heads.tolist()))
            if wants_shift:
                cached = pool.read(slots[: len(documents)][chunk])
                shifts.append(kv_shift(k[: len(cached[0])], v[: len(cached[0])], *cached))
            pool.write(k, v, slots[chunk])
        exact = decoder.computes_columns(layer, "k_proj", "v_proj")
        counter.key_value(len(slots), len(heads) if exact else decoder.shape.num_kv_heads)
        counter.rotation(len(slots) * len(heads))
        if not shifts:
            return None
        counter.kv_shift(len(documents), len(heads))
        return torch.cat(shifts)

    # --- what makes a row important --------------------------------------------------------------

    def _global_rows(self, layer: int, heads: tuple[int, ...] | None = None) -> GlobalRows:
        chosen = self._heads[layer] if heads is None else np.array(heads)
        return GlobalRows.of(self._pool, self._session, layer, chosen, self._prompt.layout)

    def _pick(self, layer: int, pick: Pick, among: np.ndarray, shift: Tensor | None = None) -> None:
        """Keep some of the set `among`: by `shift`, or by what heads bring."""
        read_by = None
        if pick.by != "kv_shift":
            shift, read_by = self._probe(layer, pick, among)
        assert shift is not None
        self._rows.pick(pick, among, shift, read_by)
        if self._on_pick is not None:
            self._on_pick(among, self._rows.now(among).cpu().numpy())

    def _probe(
        self, layer: int, pick: Pick, among: np.ndarray
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Importance of every row of `among`, by the attention of global heads alone.

        As far as stored hidden states tell. Also what some of the rows, given by index, read of
        each row.
        """
        rows, decoder, counter = self._rows, self._decoder, self._counter
        pages = self._global_rows(layer, pick.heads)
        documents, num_rows = rows.tensor(among), len(among)
        positions, windows = documents.int(), self._rules.windows[layer][list(pages.heads)]
        parts = []
        for chunk in self._chunks(num_rows):
            normed = decoder.attention_norm(layer, rows.stored(among[chunk], layer))
            parts.append(decoder.query(layer, normed, positions[chunk], pages.heads))
        q = torch.cat(parts)
        whole = self._tensor(np.array([0, num_rows]))
        out, lse = self._attend_global(layer, pages.heads, q, positions, *pages.everything(), whole)
        exact = decoder.computes_columns(layer, "q_proj")
        columns = len(pages.heads) if exact else decoder.shape.num_kv_heads
        counter.probe(documents, windows, columns=columns)

        def read_by(chosen: Tensor) -> Tensor:
            slots = self._pool.allocator.position_slots(self._session, layer, among)
            k, _ = self._pool.read(self._tensor(slots[:, list(pages.heads)], torch.int64))
            k = ops.rope_realign(k, positions - rows.key_positions[documents], decoder.inv_freq)
            counter.reading(len(chosen), num_rows, len(pages.heads))
            return weight_read(
                q[chosen],
                lse[:, chosen],
                k,
                positions[chosen],
                positions,
                int(windows[0]),  # the same for all global heads
                decoder.softmax_scale,
                decoder.softcap,
            )

        if pick.by == "attention_norm":
            return ops.token_importance(out), read_by
        return self._foreign(layer, pages, documents, q, out, lse), read_by

    def _foreign(
        self,
        layer: int,
        pages: GlobalRows,
        documents: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> Tensor:
        """What global heads brought to the rows `documents` from other segments, [num_rows]."""
        layout = self._prompt.layout
        ends = self._tensor(np.array([d.end for d in layout.documents]), torch.int64)
        bounds = torch.searchsorted(documents, ends).int()
        bounds = torch.cat([bounds.new_zeros(1), bounds])
        own = self._attend_global(layer, pages.heads, q, documents.int(), *pages.own(), bounds)
        windows = self._rules.windows[layer][list(pages.heads)]
        self._counter.own_attention(documents, windows, layout)
        return foreign_part(out, lse, *own)

    def _attend_global(
        self,
        layer: int,
        heads: tuple[int, ...],
        q: Tensor,
        q_positions: Tensor,
        row_indptr: np.ndarray,
        page_refs: np.ndarray,
        cu_seqlens_q: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of some global heads of the layer for some document rows."""
        chosen, num_seqs = list(heads), len(cu_seqlens_q) - 1
        return self._pool.attend_rows(
            q,
            row_indptr,
            page_refs,
            cu_seqlens_q=cu_seqlens_q,
            q_positions=q_positions,
            row_window=self._tensor(np.tile(self._rules.windows[layer][chosen], num_seqs)),
            row_sink=self._tensor(np.tile(self._rules.sinks[layer][chosen], num_seqs)),
            inv_freq=self._decoder.inv_freq,
            softmax_scale=self._decoder.softmax_scale,
            softcap=self._decoder.softcap,
            return_lse=True,
        )

    def _add_foreign(self, layer: int, chunk: slice, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add up what this layer's global heads, if it has any, brought to a chunk of rows."""
        rows, heads = self._rows, self._heads[layer]
        documents = rows.documents[chunk]
        if not len(heads) or not len(documents):
            return
        group = self._decoder.shape.group_size
        index = np.concatenate([np.arange(h * group, (h + 1) * group) for h in heads])
        columns, num_rows = self._tensor(index, torch.int64), len(documents)
        brought = self._foreign(
            layer,
            self._global_rows(layer),
            documents,
            q[:num_rows, columns],
            out[:num_rows, columns],
            lse[columns, :num_rows],
        )
        if rows.foreign is None:
            rows.foreign = brought.new_zeros(len(rows.positions))
        rows.foreign[chunk][:num_rows] += brought

    # --- FFN -------------------------------------------------------------------------------------

    def _add_ffn(
        self, layer: int, rule: FfnRule | None, hidden: Tensor, norms: Tensor | None
    ) -> Tensor:
        """Add the FFN of the rows that the rule selects, by `norms` or else; of all without one."""
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
            assert norms is not None
            importance = norms
            counter.selection(len(hidden))
        if self._forced is None or self._forced[0] is not rule.forced_positions:
            forced = torch.zeros(len(rows.key_positions), dtype=torch.bool)
            forced[torch.from_numpy(rule.forced_positions)] = True
            self._forced = (rule.forced_positions, forced.to(hidden.device))
        indices, count = select_rows(importance, rule, self._forced[1][rows.positions])
        counter.ffn_later(count)
        return decoder.add_sparse_ffn(layer, hidden, indices, count)
