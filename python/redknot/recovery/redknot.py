"""RedKnot as published: all rows live, global heads refreshed, the FFN sparse in deep layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.recovery.options import check_counts, check_shares, check_signals
from redknot.recovery.plan import FfnRule, LayerPlan, PromptLayout, RecoveryPlan, Signal
from redknot.recovery.policy import Policy

__all__ = ["RedKnot"]


@dataclass(frozen=True)
class RedKnot(Policy):
    """Elastic Sparsity (arXiv 2606.06256).

    Every row of a moved document lives in every layer. Its K/V replace the cached ones in global
    heads; local heads keep the cached, realigned K/V but for the first `boundary_rows` rows of each
    moved document.

    Parameters
    ----------
    dense_until : int
        Layers below it run the FFN for every live row.
    ffn_mass : float
        From `dense_until` on, the FFN runs for the smallest set of rows that holds this share of
        the importance (`signal`). 1: every row.
    deep_start, ffn_mass_deep : int, float, optional
        From layer `deep_start` on, `ffn_mass_deep` takes the place of `ffn_mass`.
    recent_n : int
        The last rows of each moved document whose FFN always runs.
    min_keep : int
        The least number of rows that the FFN runs for.
    boundary_rows : int
        First rows of each moved document that are refreshed in local heads too.
    signal : {"attention_norm", "foreign", "random"}
        What makes a row important for the sparse FFN: the norm of its attention output, as
        published; what the global heads bring in from other segments; chance (`draw_seed`).
    """

    dense_until: int = 0
    ffn_mass: float = 1.0
    deep_start: int | None = None
    ffn_mass_deep: float | None = None
    recent_n: int = 128
    min_keep: int = 1
    boundary_rows: int = 0
    signal: Signal = "attention_norm"
    draw_seed: int = 0

    name: ClassVar[str] = "redknot"

    def __post_init__(self) -> None:
        check_shares(self, "ffn_mass", "ffn_mass_deep")
        check_counts(
            self, "dense_until", "deep_start", "recent_n", "min_keep", "boundary_rows", "draw_seed"
        )
        check_signals(self, "signal")
        if (self.deep_start is None) != (self.ffn_mass_deep is None):
            raise InputError("RedKnot: deep_start and ffn_mass_deep belong together; give both")

    def mass_of_layer(self, layer: int) -> float:
        """Share of the importance that the FFN of `layer` must hold."""
        if layer < self.dense_until:
            return 1.0
        if self.deep_start is not None and layer >= self.deep_start:
            assert self.ffn_mass_deep is not None  # __post_init__
            return self.ffn_mass_deep
        return self.ffn_mass

    def plan(self, layout: PromptLayout, heads: HeadMap) -> RecoveryPlan:
        """All moved rows live in all layers."""
        live = layout.moved_positions
        fresh_local = layout.boundary_positions(self.boundary_rows)
        forced = np.concatenate([layout.recent_positions(self.recent_n), layout.query_positions])
        layers = []
        for layer in range(heads.num_layers):
            mass = self.mass_of_layer(layer)
            rule = None
            if mass < 1.0:
                rule = FfnRule(mass, self.min_keep, forced, self.signal, self.draw_seed + layer)
            layers.append(LayerPlan(live, live, fresh_local, rule))
        return RecoveryPlan(tuple(layers), reason="every row of a moved document")
