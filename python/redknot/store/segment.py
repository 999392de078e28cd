"""A segment: a run of tokens whose K and V were computed once and lie in pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Segment"]


@dataclass(frozen=True)
class Segment:
    """K and V of a run of tokens, for every layer and KV head, in the pages of a pool.

    Attributes
    ----------
    key : str
        Cryptographic key (`redknot.store.segment_key`).
    handle : int
        The allocator's id of its pages.
    first_position : int
        Position its first token was computed at.
    num_tokens : int
        Its own tokens; the prefix it was computed behind is not among them.
    offline_flops, offline_seconds : float
        What computing it cost.
    hidden : Tensor, optional
        Hidden states [num_tokens, hidden_dim] of its tokens at the input of layer `hidden_layer`,
        in the model's dtype, on its device and outside the page pool.
    hidden_layer : int, optional
        Which layer's; None without hidden states. Declared in the key (`stored_parts`).
    origin : str
        How it came into the pool, in words.
    """

    key: str
    handle: int
    first_position: int
    num_tokens: int
    offline_flops: float
    offline_seconds: float
    hidden: Tensor | None = field(default=None, repr=False, compare=False)
    hidden_layer: int | None = None
    origin: str = field(default="", compare=False)
