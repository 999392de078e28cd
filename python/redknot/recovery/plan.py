"""What a policy decides: which rows live in each layer, and which cached K/V they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["FfnRule", "LayerPlan", "Placement", "PromptLayout", "RecoveryPlan"]


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
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class FfnRule:
    """Which live rows a layer's FFN runs for (all of them when a layer has no rule).

    The smallest set that holds `mass` of the importance, at least `min_keep` rows, and always the
    rows at `forced_positions`.
    """

    mass: float
    min_keep: int
    forced_positions: np.ndarray


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a recovery.

    Attributes
    ----------
    live : np.ndarray
        Positions of document rows whose hidden state is carried through this layer, ascending. The
        query's rows are always live and not listed. A subset of the layer before.
    fresh_local : np.ndarray
        Positions, among `live`, whose K/V replace the cached ones in local heads too; in global
        heads all of `live` do.
    ffn : FfnRule, optional
        None: the FFN runs for every live row.
    """

    live: np.ndarray
    fresh_local: np.ndarray
    ffn: FfnRule | None = None


@dataclass(frozen=True)
class RecoveryPlan:
    """A policy's decision for one prompt."""

    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = field(default=())
