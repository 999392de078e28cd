"""Runs prefills, decode steps and offline passes of one model over the pages of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from redknot.cache import KVPool
from redknot.engine.live_rows import Prompt
from redknot.engine.recovery_pass import HeadRules, LayerTrace, RecoveryPass, TokenSlots
from redknot.models.decoder import Decoder
from redknot.recovery import FlopCounter

__all__ = ["HeadRules", "LayerTrace", "Prompt", "Runner", "TokenSlots"]


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
        on_pick: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> tuple[Tensor, list[LayerTrace]]:
        """Logits [vocab_size] of a prompt's last row, and which document rows lived.

        See `RecoveryPass` for the arguments.
        """
        work = RecoveryPass(
            self.decoder, self.pool, session, prompt, rules, tail_slots, counter, on_pick
        )
        return work.run(), work.trace

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
        cu_seqlens_q, q_positions = self._tensor(np.array([0, num_rows])), self._tensor(rows)
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
            out = self.pool.attend(
                decoder.query(layer, normed, q_positions),
                [session],
                layer,
                cu_seqlens_q=cu_seqlens_q,
                q_positions=q_positions,
                row_window=self._tensor(rules.windows[layer]),
                row_sink=self._tensor(rules.sinks[layer]),
                inv_freq=decoder.inv_freq,
                softmax_scale=decoder.softmax_scale,
                softcap=decoder.softcap,
            )
            hidden = decoder.add_ffn(layer, decoder.add_attention(layer, hidden, out))
            counter.query_and_output(num_rows)
            counter.rotation(num_rows * shape.num_q_heads)
            counter.attention(rows, rules.windows[layer], rules.sinks[layer])
            counter.ffn(num_rows)
        return kept

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
                softcap=decoder.softcap,
                selectors=[r.selector for r in rules],
            )
            hidden = decoder.add_attention(layer, hidden, out)
            hidden = decoder.add_ffn(layer, hidden)
        return decoder.logits(hidden[self._tensor(ends - 1, torch.int64)])
