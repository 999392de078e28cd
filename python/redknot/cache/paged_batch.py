"""A batch of sequences in pages: what a model's forward passes append, attend to, crop and fork.

The state behind `SegPagedCache`; it knows nothing of Hugging Face. Batch row b is one session of
the page pool. Padding is never stored: a token's position is its rank among the real tokens of its
row, so a row that starts with pads holds the same pages as if it ran alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redknot import _memory
from redknot.cache.pool import KVPool, out_of_pages
from redknot.cache.pool_options import PoolOptions
from redknot.cache.step import Step
from redknot.errors import BudgetError, HeadMapError, InputError

__all__ = ["PagedBatch"]


def _release(pool: KVPool, sessions: list[int]) -> None:
    for session in sessions:
        pool.allocator.release_session(session)
    sessions.clear()


class PagedBatch:
    """Sessions of one batch over a page pool, one per batch row.

    Parameters
    ----------
    windows, sinks : ndarray of int32 [num_layers, num_kv_heads]
        The rule of each head (window -1: global), as `HeadMap.rules` gives it.
    options : PoolOptions
        The pool is made with the first tokens, which tell batch size, head_dim, dtype and device.
    pool : KVPool, optional
        A pool that others use too; `options` then only gives `max_tokens`.
    """

    def __init__(
        self,
        windows: NDArray[np.int32],
        sinks: NDArray[np.int32],
        options: PoolOptions,
        pool: KVPool | None = None,
    ) -> None:
        self.windows, self.sinks = windows, sinks
        self.options = options
        self.pool = pool
        self._owns_pool = pool is None
        self.sessions: list[int] = []
        self.keep_expired = False  # while a caller may still take tokens back
        self._seen = [0] * len(windows)  # slots per layer, pads included
        self._appended = 0  # slots that the allocator knows of
        self._pads: list[NDArray[np.int64]] = []  # per row: slots that hold no token
        self._step: Step | None = None
        self._is_by_layer = False  # the pass in progress takes and gives back pages layer by layer
        self._row_rules: list[tuple[Tensor, Tensor]] = []
        self._finalizer: weakref.finalize | None = None

    # --- one layer of one forward pass ----------------------------------------------------------

    def num_slots(self) -> int:
        """Slots per row that every layer has seen, pads included."""
        return min(self._seen)

    def announce(self, layer: int, step_tokens: int) -> None:
        """Count the slots of a forward pass; `attend` of the same layer must follow.

        Where the pass before broke off half-way, its tokens are taken back first.
        """
        if self._seen[layer] == self._appended > self.num_slots():
            self.crop(self._appended - self.num_slots())
        self._seen[layer] += step_tokens

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_token: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Write the keys and values of a forward pass to pages and attend to the rows' pages.

        Parameters
        ----------
        q : Tensor [batch, step_tokens, num_q_heads, head_dim]
            Rotated, as are the keys.
        k, v : Tensor [batch, step_tokens, num_kv_heads, head_dim]
        is_token : bool Tensor [batch, step_tokens], optional
            False where a slot is padding.

        Returns
        -------
        Tensor
            Like q; zero for pads.
        """
        if self._seen[layer] > self._appended:
            self._begin_step(k, is_token)
        step, pool = self._step, self.pool
        assert step is not None and pool is not None
        batch, step_tokens = q.shape[:2]
        q, k, v = (tensor.reshape(batch * step_tokens, *tensor.shape[2:]) for tensor in (q, k, v))
        if step.token_index is not None:
            tokens_q, k, v = q[step.token_index], k[step.token_index], v[step.token_index]
        else:
            tokens_q = q
        if self._is_by_layer:
            pool.allocator.append_layer(self.sessions, step.num_tokens, layer)
        slots = [
            pool.allocator.tail_slots(session, layer, int(count))
            for session, count in zip(self.sessions, step.num_tokens, strict=True)
        ]
        pool.write(k, v, np.concatenate(slots))
        row_window, row_sink = self._row_rules[layer]
        out = pool.attend(
            tokens_q,
            self.sessions,
            layer,
            cu_seqlens_q=step.cu_seqlens_q,
            q_positions=step.q_positions,
            row_window=row_window,
            row_sink=row_sink,
            softmax_scale=softmax_scale,
            softcap=softcap,
        )
        if self._is_by_layer:
            for session in self.sessions:
                pool.allocator.expire_layer(session, layer)
        if step.token_index is not None:
            tokens_out, out = out, torch.zeros_like(q)
            out[step.token_index] = tokens_out
        is_last = layer == len(self._seen) - 1
        if is_last and step_tokens > pool.page_size and not self.keep_expired:
            self.expire()  # a prompt leaves much behind; decoding expires as it appends
        self._is_by_layer &= not is_last
        return out.view(batch, step_tokens, *out.shape[1:])

    def _begin_step(self, k: Tensor, is_token: Tensor | None) -> None:
        """Make room for a pass's tokens in all layers, or change nothing."""
        batch, step_tokens = k.shape[:2]
        if self.sessions and len(self.sessions) != batch:
            raise InputError(
                f"the cache holds {len(self.sessions)} sequences, got a batch of {batch}"
            )
        limit = self.options.max_tokens
        if limit is not None and self._appended + step_tokens > limit:
            self._seen = [self._appended] * len(self._seen)
            raise BudgetError(
                f"the cache was made for at most {limit} tokens, but {self._appended} are in it "
                f"and {step_tokens} more were given; raise max_tokens"
            )
        if is_token is not None and bool(is_token.all()):
            is_token = None
        if is_token is None:
            num_tokens = np.full(batch, step_tokens, dtype=np.int64)
            new_pads = [np.empty(0, dtype=np.int64)] * batch
        else:
            on_host = is_token.cpu().numpy()
            num_tokens = on_host.sum(axis=1).astype(np.int64)
            new_pads = [np.flatnonzero(~row) + self._appended for row in on_host]
        # The first prompt of a pool of its own: nobody else takes pages that are counted on, and
        # a pass that breaks off can be taken back, as there was nothing before it.
        self._is_by_layer = (
            self._owns_pool
            and not self._appended
            and not self.keep_expired
            and step_tokens > self.options.page_size
            and bool((self.windows >= 0).any())
        )
        try:
            self._append(k, num_tokens)
        except BaseException:
            self._seen = [self._appended] * len(self._seen)
            raise
        self._pads = [np.concatenate(p) for p in zip(self._pads, new_pads, strict=True)]
        self._appended += step_tokens
        ends = num_tokens.tolist()
        if not self._is_by_layer:
            assert self.pool is not None
            ends = [self.pool.allocator.session_length(session) for session in self.sessions]
        self._step = Step.ending_at(ends, num_tokens, is_token, k.device)

    def _append(self, k: Tensor, num_tokens: NDArray[np.int64]) -> None:
        pool = self._ready_pool(k, num_tokens)
        try:
            copies = self._append_tokens(pool, num_tokens)
        except _memory.OutOfPages as error:
            if not self._owns_pool or self.options.fixed_pages(k.shape[-1], k.dtype) is not None:
                raise self._out_of_pages(pool, error) from None
            num_pages = len(pool.k_cache)
            missing = error.pages_needed - error.pages_free
            pool.grow(max(num_pages + missing, 2 * num_pages))
            copies = self._append_tokens(pool, num_tokens)
        pool.copy(copies)

    def _append_tokens(self, pool: KVPool, num_tokens: NDArray[np.int64]) -> NDArray[np.int32]:
        allocator = pool.allocator
        if self._is_by_layer:  # each layer takes its own; that all of them can is seen to here
            free, needed = (
                allocator.free_pages(),
                allocator.layerwise_pages(self.sessions, num_tokens),
            )
            if needed > free:
                raise out_of_pages(needed, free)
            return np.empty((0, 2), dtype=np.int32)
        # What has left the windows is seen by none of the new tokens either.
        return allocator.append_tokens(
            self.sessions, num_tokens, expire_first=not self.keep_expired
        )

    # --- the pool -------------------------------------------------------------------------------

    def _ready_pool(self, k: Tensor, num_tokens: NDArray[np.int64]) -> KVPool:
        """Return the pool, made now if need be, with a session for every row."""
        if self.pool is None:
            num_pages = self.options.first_pages(
                self.windows,
                self.sinks,
                num_tokens,
                k.shape[-1],
                k.dtype,
                by_layer=self._is_by_layer,
            )
            self.pool = self.options.make_pool(self.windows.shape, k, num_pages)
        pool = self.pool
        cached = pool.k_cache
        num_heads, head_dim = k.shape[2:]
        if (num_heads, head_dim) != (pool.num_kv_heads, cached.shape[2]) or cached.dtype != k.dtype:
            raise InputError(
                f"the cache holds {pool.num_kv_heads} KV heads of {cached.shape[2]} "
                f"{cached.dtype} elements, got {num_heads} of {head_dim} {k.dtype}"
            )
        if cached.device != k.device:
            raise InputError(f"the cache lies on {cached.device}, but a layer's keys on {k.device}")
        if not self.sessions:
            self._adopt(pool, [pool.allocator.create_session(self.windows, self.sinks) for _ in k])
            self._pads = [np.empty(0, dtype=np.int64) for _ in k]
        return pool

    def _adopt(self, pool: KVPool, sessions: list[int]) -> None:
        """Hold these sessions from now on; they are released with this object at the latest."""
        self.pool, self.sessions = pool, sessions
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _release, pool, sessions)
        device = pool.k_cache.device

        def for_all_rows(rule: NDArray[np.int32]) -> Tensor:
            return torch.from_numpy(np.tile(rule, len(sessions))).to(device)

        self._row_rules = [
            (for_all_rows(windows), for_all_rows(sinks))
            for windows, sinks in zip(self.windows, self.sinks, strict=True)
        ]

    def _out_of_pages(self, pool: KVPool, error: _memory.OutOfPages) -> BudgetError:
        stats = pool.allocator.stats()
        page_bytes = stats["bytes_per_page"]
        return BudgetError(
            f"the KV budget of {stats['num_pages']} pages "
            f"({stats['num_pages'] * page_bytes} bytes) cannot hold these tokens: "
            f"{error.pages_needed} more pages are needed, "
            f"{error.pages_free} are free; raise budget_bytes, or prefill in smaller chunks"
        )

    # --- the batch as a whole -------------------------------------------------------------------

    def expire(self) -> None:
        """Free the pages that no later token can see."""
        if self.pool is not None:
            for session in self.sessions:
                self.pool.allocator.expire(session)

    def reset(self) -> None:
        """Forget all tokens; the pool stays."""
        if self.pool is not None:
            _release(self.pool, self.sessions)
        self._pads, self._step = [], None
        self._appended = 0
        self._seen = [0] * len(self._seen)

    def select(self, rows: Sequence[int]) -> None:
        """Make the batch consist of these rows of it, in this order; repeated ones share pages."""
        if self.pool is None or not self.sessions:
            return
        for row in rows:
            if not 0 <= row < len(self.sessions):
                raise InputError(f"the cache holds {len(self.sessions)} sequences, got row {row}")
        taken: set[int] = set()
        sessions = []
        for row in rows:
            session = self.sessions[row]
            sessions.append(self.pool.allocator.fork_session(session) if row in taken else session)
            taken.add(row)
        for row, session in enumerate(self.sessions):
            if row not in taken:
                self.pool.allocator.release_session(session)
        self._pads = [self._pads[row] for row in rows]
        self._step = None
        self._adopt(self.pool, sessions)

    def crop(self, slots_to_remove: int) -> None:
        """Take back the last slots of every row.

        Raises
        ------
        InputError
            When there are not so many, or a local head has already freed what the shorter
            sequence would see; nothing has changed then.
        """
        new_length = self._appended - slots_to_remove
        if not 0 <= slots_to_remove <= self._appended:
            raise InputError(f"cannot crop {slots_to_remove} of {self._appended} tokens")
        if slots_to_remove and self.pool is not None:
            allocator = self.pool.allocator
            before = [(s, allocator.session_length(s)) for s in self.sessions]
            lengths = [new_length - int((pads < new_length).sum()) for pads in self._pads]
            # Tried on forks first, which cost no page: all rows are cropped or none.
            trials = [allocator.fork_session(session) for session, _ in before]
            fits = all(
                allocator.truncate(trial, length)
                for trial, length in zip(trials, lengths, strict=True)
            )
            if not fits:
                _release(self.pool, trials)
                raise InputError(
                    f"cannot crop {slots_to_remove} tokens: local heads have freed pages that the "
                    "shorter sequence would see; crop sooner, or use a head map of wider windows"
                )
            _release(self.pool, self.sessions)
            self._pads = [pads[pads < new_length] for pads in self._pads]
            self._adopt(self.pool, trials)
        self._appended, self._step = new_length, None
        self._seen = [new_length] * len(self._seen)

    def compress(self, windows: NDArray[np.int32], sinks: NDArray[np.int32]) -> int:
        """Follow other rules from now on, in every row or none; returns how many pages this freed.

        Raises
        ------
        HeadMapError
            Where a row has dropped tokens that its new rule would see; nothing has changed then.
        InputError
            In the middle of a forward pass.
        """
        if self.num_slots() != self._appended:
            raise InputError("the cache cannot be compressed in the middle of a forward pass")
        free = 0
        if self.pool is not None:
            allocator = self.pool.allocator
            free = allocator.free_pages()
            # Tried on forks first, which cost no page: all rows are compressed or none.
            trials = [allocator.fork_session(session) for session in self.sessions]
            try:
                for trial in trials:
                    allocator.change_rules(trial, windows, sinks)
            except ValueError as error:
                _release(self.pool, trials)
                what = str(error).removeprefix("change_rules: ")
                raise HeadMapError(
                    f"{what}; what a head has dropped is gone: prefill again under the wider map"
                ) from None
            _release(self.pool, self.sessions)
            self.windows, self.sinks = windows, sinks
            self._adopt(self.pool, trials)
            free = allocator.free_pages() - free
        self.windows, self.sinks = windows, sinks
        self._step = None
        return free

    def pages_per_class(self) -> dict[str, int]:
        """Count the distinct pages that the batch holds, in rows of global and of local heads."""
        counts = {"global": 0, "local": 0}
        if self.pool is None or not self.sessions:
            return counts
        num_rows = len(self.sessions) * self.windows.shape[1]
        for layer, windows in enumerate(self.windows):
            indptr, refs = self.pool.allocator.rows(self.sessions, layer)
            is_global = np.repeat(np.tile(windows < 0, len(self.sessions)), np.diff(indptr))
            assert len(indptr) == num_rows + 1
            counts["global"] += len(np.unique(refs[is_global, 0]))
            counts["local"] += len(np.unique(refs[~is_global, 0]))
        return counts
