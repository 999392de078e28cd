"""The offline pass: a segment's tokens through every head, once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from redknot.engine.runner import HeadRules, Runner
from redknot.recovery import FlopCounter
from redknot.store import Segment

__all__ = ["OfflinePass"]


class OfflinePass:
    """Computes K, V and hidden states of segments in the pages of a pool."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def encode(
        self,
        handle: int,
        token_ids: np.ndarray,
        first_position: int,
        *,
        context: Segment | None,
        hidden_layer: int | None,
        writes: bool = True,
        progress: Callable[[], None] | None = None,
    ) -> tuple[Tensor | None, float]:
        """Dense prefill of a segment behind its context.

        Parameters
        ----------
        handle : int
            The segment's pages; with `writes` K and V are put there, otherwise they are there.
        token_ids : np.ndarray
            Its tokens, the first one at `first_position`.
        context : Segment, optional
            What it is computed behind.
        hidden_layer : int, optional
            Whose input is wanted.
        progress : callable, optional
            Called after each layer.

        Returns
        -------
        tuple
            Hidden states [num_tokens, hidden_dim], if wanted, and the FLOPs of the pass.
        """
        decoder, allocator = self._runner.decoder, self._runner.pool.allocator
        counter = FlopCounter(decoder.shape)
        windows = decoder.native_windows()
        rules = HeadRules(np.ones_like(windows, dtype=bool), windows, np.zeros_like(windows))
        session = allocator.create_session(rules.windows, rules.sinks)
        try:
            if context is not None:
                allocator.append_segment(session, context.handle)
            allocator.append_segment(session, handle)
            hidden = self._runner.encode(
                session,
                token_ids,
                first_position,
                rules,
                slots=(lambda layer: allocator.segment_slots(handle, layer)) if writes else None,
                counter=counter,
                hidden_layer=hidden_layer,
                progress=progress,
            )
        finally:
            allocator.release_session(session)
        return hidden, sum(counter.close().values())
