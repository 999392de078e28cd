"""One forward pass of a batch: which of its slots hold tokens, and where these stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """The tokens among the [batch, step_tokens] slots of a forward pass.

    Attributes
    ----------
    num_tokens : int64 [batch]
        Per session.
    token_index : int64 Tensor or None
        Into the flattened slots; None: all of them are tokens.
    cu_seqlens_q, q_positions : int32 Tensor [batch + 1], [num_tokens]
        As `redknot.ops.seg_paged_attention` takes them.
    """

    num_tokens: NDArray[np.int64]
    token_index: Tensor | None
    cu_seqlens_q: Tensor
    q_positions: Tensor

    @classmethod
    def ending_at(
        cls,
        ends: Sequence[int],
        num_tokens: NDArray[np.int64],
        is_token: Tensor | None,
        device: torch.device,
    ) -> Step:
        """Make the step whose tokens are the last ones before position `ends` of each session."""
        positions = [np.arange(end - n, end) for end, n in zip(ends, num_tokens, strict=True)]
        cu_seqlens = np.concatenate([[0], np.cumsum(num_tokens)])

        def on_device(array: NDArray) -> Tensor:
            return torch.from_numpy(array.astype(np.int32)).to(device)

        index = None if is_token is None else is_token.reshape(-1).nonzero().squeeze(1)
        return cls(
            num_tokens,
            None if index is None else index.to(device),
            on_device(cu_seqlens),
            on_device(np.concatenate(positions)),
        )
