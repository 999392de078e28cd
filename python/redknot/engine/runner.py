"""Runs a recovery plan layer by layer, and decode steps, over the pages of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redknot import ops
from redknot.cache import KVPool
from redknot.cache.page_selection import PageSelector
from redknot.models.decoder import Decoder
from redknot.recovery import FfnRule, FlopCounter, LayerPlan, PromptLayout, RecoveryPlan

__all__ = ["HeadRules", "Prompt", "Runner", "TokenSlots"]

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
class Prompt:
    """A prompt as the runner needs it: tokens and layout by true position, and the plan."""

    token_ids: np.ndarray
    layout: PromptLayout
    plan: RecoveryPlan

    def key_positions(self) -> np.ndarray:
        """Position each token's key is rotated at: its home in its own document."""
        positions = np.arange(len(self.token_ids))
        for document in self.layout.documents:
            positions[document.begin : document.end] -= document.offset
        return positions


class Runner:
    """Executes plans for one model over one pool."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self.decoder = decoder
        self.pool = pool

    def _tensor(self, array: np.ndarray, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=self.decoder.device)

    @torch.inference_mode()
    def prefill(
        self,
        session: int,
        prompt: Prompt,
        rules: HeadRules,
        *,
        tail_slots: TokenSlots,
        counter: FlopCounter,
    ) -> Tensor:
        """Compute the live rows of every layer and write the K/V that the plan refreshes.

        The session's rows hold all tokens already (attached documents, room for the query), and
        pages to be written are private. `tail_slots(layer)` gives the slots of the query's rows,
        [num_query_rows, num_kv_heads]. Returns the logits [vocab_size] of the last row.
        """
        decoder, plan = self.decoder, prompt.plan
        query = prompt.layout.query_positions
        key_positions = prompt.key_positions()
        live = plan.layers[0].live
        rows = np.concatenate([live, query])
        hidden = decoder.embed(self._tensor(prompt.token_ids[rows], torch.int64))
        cu_seqlens_q, q_positions = self._query_index(rows)
        forced = _ForcedRows(decoder.device)
        for layer, step in enumerate(plan.layers):
            if step.live is not live:
                kept = np.concatenate([np.isin(live, step.live), np.ones(len(query), dtype=bool)])
                hidden = hidden[self._tensor(kept, torch.bool)]
                live = step.live
                rows = np.concatenate([live, query])
                cu_seqlens_q, q_positions = self._query_index(rows)
            normed = decoder.attention_norm(layer, hidden)
            self._refresh_kv(
                session, layer, normed, rows, key_positions, step, rules, tail_slots, counter
            )
            out = self._attend(session, layer, normed, cu_seqlens_q, q_positions, rules)
            hidden = decoder.add_attention(layer, hidden, out)
            counter.query_and_output(len(rows))
            counter.rotation(len(rows) * decoder.shape.num_q_heads)
            counter.attention(rows, rules.windows[layer], rules.sinks[layer])
            if step.ffn is None:
                hidden = decoder.add_ffn(layer, hidden)
                counter.ffn(len(rows))
            else:
                indices, count = self._select(out, step.ffn, forced.mask(step.ffn, rows))
                hidden = decoder.add_sparse_ffn(layer, hidden, indices, count)
                counter.selection(len(rows))
                counter.ffn_later(count)
        counter.lm_head()
        return decoder.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def encode(
        self,
        session: int,
        token_ids: np.ndarray,
        first_position: int,
        rules: HeadRules,
        *,
        slots: TokenSlots | None,
        counter: FlopCounter,
        hidden_layer: int | None = None,
        progress: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Pass over a segment's tokens, the last of `session`, in every head; K/V are written.

        It ends when the last layer's K/V are; without `slots` they lie in the pages already, and
        it ends at `hidden_layer`. Returns the hidden states [num_tokens, hidden_dim] at the input
        of `hidden_layer`, or None without one.
        """
        decoder, shape, num_rows = self.decoder, self.decoder.shape, len(token_ids)
        rows = np.arange(first_position, first_position + num_rows)
        cu_seqlens_q, q_positions = self._query_index(rows)
        hidden, kept = decoder.embed(self._tensor(token_ids, torch.int64)), None
        for layer in range(shape.num_layers):
            if layer == hidden_layer:
                kept = hidden
                if slots is None:
                    break
            normed = decoder.attention_norm(layer, hidden)
            if slots is not None:
                self.pool.write(*decoder.key_value(layer, normed, q_positions), slots(layer))
                counter.key_value(num_rows, shape.num_kv_heads)
                counter.rotation(num_rows * shape.num_kv_heads)
            if progress is not None:
                progress()
            if layer == shape.num_layers - 1:
                break
            out = self._attend(session, layer, normed, cu_seqlens_q, q_positions, rules)
            hidden = decoder.add_ffn(layer, decoder.add_attention(layer, hidden, out))
            counter.query_and_output(num_rows)
            counter.rotation(num_rows * shape.num_q_heads)
            counter.attention(rows, rules.windows[layer], rules.sinks[layer])
            counter.ffn(num_rows)
        return kept

    def _attend(
        self,
        session: int,
        layer: int,
        normed: Tensor,
        cu_seqlens_q: Tensor,
        q_positions: Tensor,
        rules: HeadRules,
    ) -> Tensor:
        """Attention output [num_rows, num_q_heads, head_dim] of some rows of one session."""
        return self.pool.attend(
            self.decoder.query(layer, normed, q_positions),
            [session],
            layer,
            cu_seqlens_q=cu_seqlens_q,
            q_positions=q_positions,
            row_window=self._tensor(rules.windows[layer]),
            row_sink=self._tensor(rules.sinks[layer]),
            inv_freq=self.decoder.inv_freq,
            softmax_scale=self.decoder.softmax_scale,
        )

    def _query_index(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._tensor(np.array([0, len(rows)])), self._tensor(rows)

    def _refresh_kv(
        self,
        session: int,
        layer: int,
        normed: Tensor,
        rows: np.ndarray,
        key_positions: np.ndarray,
        step: LayerPlan,
        rules: HeadRules,
        tail_slots: TokenSlots,
        counter: FlopCounter,
    ) -> None:
        """Write K/V: global heads of all live rows, local heads of the query and `fresh_local`."""
        num_kv_heads = self.decoder.shape.num_kv_heads
        slots = np.concatenate(
            [self.pool.allocator.position_slots(session, layer, step.live), tail_slots(layer)]
        )
        global_heads = np.flatnonzero(rules.is_global[layer])
        if len(step.live) == len(step.fresh_local) or len(global_heads) == num_kv_heads:
            writes = [(np.arange(len(rows)), np.arange(num_kv_heads))]
        else:
            fresh = np.searchsorted(step.live, step.fresh_local)
            fresh = np.concatenate([fresh, np.arange(len(step.live), len(rows))])
            local_heads = np.flatnonzero(~rules.is_global[layer])
            writes = [(np.arange(len(rows)), global_heads), (fresh, local_heads)]
        for chosen, heads in writes:
            if not len(heads) or not len(chosen):
                continue
            all_rows = len(chosen) == len(rows)
            k, v = self.decoder.key_value(
                layer,
                normed if all_rows else normed[self._tensor(chosen, torch.int64)],
                self._tensor(key_positions[rows[chosen]]),
                tuple(int(head) for head in heads),
            )
            self.pool.write(k, v, np.ascontiguousarray(slots[np.ix_(chosen, heads)]))
            columns = len(heads) if self.decoder.computes_columns(layer) else num_kv_heads
            counter.key_value(len(chosen), columns)
            counter.rotation(len(chosen) * len(heads))

    def _select(
        self, attention_out: Tensor, rule: FfnRule, forced: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows whose FFN runs, as (indices [num_rows] int32 padded, count [1] int32).

        Everything stays on the device: the host never waits for the count.
        """
        num_rows = len(attention_out)
        index = torch.arange(num_rows, dtype=torch.int32, device=attention_out.device)
        chosen, count = ops.select_tokens(
            ops.token_importance(attention_out),
            self._tensor(np.array([0, num_rows])),
            mass=rule.mass,
            recent_n=0,
            min_keep=rule.min_keep,
        )
        # One slot more than rows takes the padding.
        keep = torch.zeros(num_rows + 1, dtype=torch.bool, device=attention_out.device)
        keep[torch.where(index < count, chosen, num_rows).long()] = True
        keep[:num_rows] |= forced
        keep = keep[:num_rows]
        place = torch.where(keep, keep.cumsum(0) - 1, num_rows)
        indices = torch.zeros(num_rows + 1, dtype=torch.int32, device=attention_out.device)
        indices[place] = index
        return indices[:num_rows], keep.sum(dtype=torch.int32).reshape(1)

    def decode(
        self, sessions: Sequence[int], token_ids: Tensor, rules: Sequence[HeadRules]
    ) -> Tensor:
        """One token for each session: logits [num_sessions, vocab_size]; see `extend`."""
        return self.extend(sessions, token_ids, [1] * len(sessions), rules)

    @torch.inference_mode()
    def extend(
        self,
        sessions: Sequence[int],
        token_ids: Tensor,
        num_tokens: Sequence[int],
        rules: Sequence[HeadRules],
    ) -> Tensor:
        """Append tokens to sessions: logits [num_sessions, vocab_size] of the last of each.

        `token_ids` [sum(num_tokens)] lie one session behind the other; pages that leave the
        windows of local heads are free before the new tokens take theirs.

        Raises
        ------
        redknot._memory.OutOfPages
            When the pool cannot hold the new tokens; nothing was changed.
        """
        decoder, allocator = self.decoder, self.pool.allocator
        sessions, counts = list(sessions), np.asarray(num_tokens)
        ends = np.cumsum(counts)
        # Row i of session s is token i - begin[s] behind what the session holds.
        lengths = np.array([allocator.session_length(s) for s in sessions])
        positions = self._tensor(np.repeat(lengths - (ends - counts), counts) + np.arange(ends[-1]))
        copies = allocator.append_tokens(sessions, counts, expire_first=True)
        self.pool.copy(copies)
        cu_seqlens_q = self._tensor(np.concatenate([[0], ends]))
        hidden = decoder.embed(token_ids)
        for layer in range(decoder.shape.num_layers):
            normed = decoder.attention_norm(layer, hidden)
            k, v = decoder.key_value(layer, normed, positions)
            slots = [
                allocator.tail_slots(s, layer, int(n))
                for s, n in zip(sessions, counts, strict=True)
            ]
            self.pool.write(k, v, np.concatenate(slots))
            out = self.pool.attend(
                decoder.query(layer, normed, positions),
                sessions,
                layer,
                cu_seqlens_q=cu_seqlens_q,
                q_positions=positions,
                row_window=self._tensor(np.concatenate([r.windows[layer] for r in rules])),
                row_sink=self._tensor(np.concatenate([r.sinks[layer] for r in rules])),
                inv_freq=decoder.inv_freq,
                softmax_scale=decoder.softmax_scale,
                selectors=[r.selector for r in rules],
            )
            hidden = decoder.add_attention(layer, hidden, out)
            hidden = decoder.add_ffn(layer, hidden)
        return decoder.logits(hidden[self._tensor(ends - 1, torch.int64)])


class _ForcedRows:
    """The mask of rows whose FFN always runs; layers with the same rule and rows share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: tuple[np.ndarray, np.ndarray] | None = None
        self._mask = torch.empty(0)

    def mask(self, rule: FfnRule, rows: np.ndarray) -> Tensor:
        forced = rule.forced_positions
        if self._of is None or self._of[0] is not forced or self._of[1] is not rows:
            self._of = (forced, rows)
            self._mask = torch.from_numpy(np.isin(rows, forced)).to(self._device)
        return self._mask
