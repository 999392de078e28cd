"""What a policy decides: which rows live in each layer, and which cached K/V they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

__all__ = [
    "NOTHING",
    "SIGNALS",
    "FfnRule",
    "LayerPlan",
    "LookAhead",
    "Pick",
    "Placement",
    "PromptLayout",
    "RecoveryPlan",
    "Signal",
]

NOTHING = np.empty(0, dtype=np.int64)  # no row


@dataclass(frozen=True)
class Placement:
    """A cached document inside a prompt.

    Attributes
    ----------
    begin, end : int
        True positions of its tokens, half open.
    offset : int
        True position minus the position it was computed at; its keys are that far from home.
    exact : bool
        Whether its K/V are what dense prefill would give: at home, behind the very same tokens.
    """

    begin: int
    end: int
    offset: int
    exact: bool

    @property
    def moved(self) -> bool:
        """Whether other tokens came before it than when it was cached."""
        return not self.exact


@dataclass(frozen=True)
class PromptLayout:
    """A prompt by true positions: prefix, documents, then the query's rows."""

    prefix_end: int
    documents: tuple[Placement, ...]
    query_begin: int
    num_tokens: int

    @property
    def query_positions(self) -> np.ndarray:
        """Positions of the query's rows, int64."""
        return np.arange(self.query_begin, self.num_tokens)

    @property
    def moved_positions(self) -> np.ndarray:
        """Positions of every token of a moved document, int64, ascending."""
        return _concat([np.arange(doc.begin, doc.end) for doc in self.documents if doc.moved])

    def boundary_positions(self, rows: int) -> np.ndarray:
        """First `rows` positions of each moved document, int64, ascending."""
        return _concat(
            [np.arange(d.begin, min(d.begin + rows, d.end)) for d in self.documents if d.moved]
        )

    def recent_positions(self, recent_n: int) -> np.ndarray:
        """Last `recent_n` positions of each moved document, int64, ascending."""
        return _concat(
            [np.arange(max(d.begin, d.end - recent_n), d.end) for d in self.documents if d.moved]
        )


def _concat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else NOTHING


# The norm of the attention output of all heads before the output projection (as published), the
# norm of what the global heads bring in from other segments, or nothing but chance.
Signal: TypeAlias = Literal["attention_norm", "foreign", "random"]
SIGNALS: tuple[Signal, ...] = ("attention_norm", "foreign", "random")


@dataclass(frozen=True)
class FfnRule:
    """Which live rows a layer's FFN runs for (all of them when a layer has no rule).

    The smallest set that holds `mass` of the importance, at least `min_keep` rows, and always the
    rows at `forced_positions`. Importance is `signal`; "foreign" adds up over the layers so far
    (a layer before the first global head runs for every row), "random" is drawn from `seed`.
    """

    mass: float
    min_keep: int
    forced_positions: np.ndarray
    signal: Signal = "attention_norm"
    seed: int = 0


@dataclass(frozen=True)
class Pick:
    """Rows of documents that are chosen while the prefill runs; the others are dropped.

    Attributes
    ----------
    keep : int
        How many rows are kept, `always` and what an earlier pick kept not counted.
    always : np.ndarray
        Positions that are kept besides, ascending; the same in all picks of a plan.
    by : {"foreign", "attention_norm", "kv_shift"}
        What is large for the rows that are kept. "foreign" and "attention_norm" are taken of the
        layer's global heads, whose queries alone are computed for it; "kv_shift" is how far the new
        K and V of all heads lie from the cached ones, so all rows' must be fresh in this layer.
    heads : tuple of int, optional
        The global KV heads that "foreign" and "attention_norm" are taken of; None: all of them.
    read : int
        How many rows are kept besides: those to which these heads give most weight in the rows that
        are kept, the most important 256 of them. Not for "kv_shift".
    """

    keep: int
    always: np.ndarray
    by: Literal["foreign", "attention_norm", "kv_shift"]
    heads: tuple[int, ...] | None = None
    read: int = 0


@dataclass(frozen=True)
class LookAhead:
    """A pick before the first layer, of rows that are then computed from the embeddings on.

    Attributes
    ----------
    layer : int
        The global heads of this one pick, given the hidden states and the K and V that are stored.
    rows : np.ndarray
        Positions of document rows that are picked from, ascending.
    pick : Pick
        By what these heads bring.
    """

    layer: int
    rows: np.ndarray
    pick: Pick


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a recovery: K and V first, then the pick, then attention and FFN.

    The query's rows are always live and fresh, and never listed. Of `live` and `fresh` one contains
    the other. Rows that the layer before did not carry enter from the documents' stored hidden
    states. From a pick on, a set stands for what was kept of it: it is either the very array that
    a pick's layer had as `live`, or all of it is in `Pick.always`. A second pick has an array of
    its own, from which whatever the first one dropped may enter again.

    Attributes
    ----------
    live : np.ndarray
        Positions of document rows that pass attention and FFN, ascending.
    fresh : np.ndarray
        Positions whose K/V replace the cached ones in global heads.
    fresh_local : np.ndarray
        Positions, among `fresh`, whose K/V replace the cached ones in local heads too.
    pick : Pick, optional
        Rows of `live` (the larger of the two sets) that are kept from here on.
    ffn : FfnRule, optional
        None: the FFN runs for every live row.
    """

    live: np.ndarray
    fresh: np.ndarray
    fresh_local: np.ndarray
    ffn: FfnRule | None = None
    pick: Pick | None = None

    @property
    def present(self) -> np.ndarray:
        """Rows that reach the layer's input: the larger of `live` and `fresh`."""
        return self.live if len(self.live) >= len(self.fresh) else self.fresh


@dataclass(frozen=True)
class RecoveryPlan:
    """A policy's decision for one prompt.

    Attributes
    ----------
    layers : tuple of LayerPlan
    reason : str
        Why these rows live, for the explanation.
    ahead : LookAhead, optional
    """

    layers: tuple[LayerPlan, ...]
    reason: str = ""
    ahead: LookAhead | None = None

    @property
    def picks(self) -> bool:
        """Whether some of the rows are chosen only while the prefill runs."""
        return self.ahead is not None or any(step.pick is not None for step in self.layers)
