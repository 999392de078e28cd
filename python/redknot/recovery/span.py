"""The live span: the layers between the first and the last global head that matter for rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.recovery.plan import FfnRule, LayerPlan, Pick, PromptLayout

__all__ = [
    "SpanRows",
    "probed_heads",
    "span_begin",
    "span_entry_layer",
    "span_plan",
    "span_start",
]

# A global head this many times less sensitive than the most sensitive one does not begin the span.
_MATTERS = 0.1
# One this many times less sensitive than the most sensitive one of its layer picks no rows there.
_PICKS = 0.5


@dataclass(frozen=True)
class SpanRows:
    """Row sets of a plan over the live span: positions, ascending, each set within the next.

    Attributes
    ----------
    boundary : np.ndarray
        Rows that live in every layer, with K and V replaced in all heads.
    edge : np.ndarray
        Rows that live from the embeddings to the end of the span: the first ones of a document,
        which local heads of early layers let see the document before.
    span : np.ndarray
        Rows that live in the span.
    """

    boundary: np.ndarray
    edge: np.ndarray
    span: np.ndarray

    @classmethod
    def of(cls, layout: PromptLayout, boundary_rows: int, edge_rows: int) -> SpanRows:
        """Every row of the moved documents in the span."""
        boundary = layout.boundary_positions(boundary_rows)
        edge = boundary
        if edge_rows > boundary_rows:
            edge = layout.boundary_positions(edge_rows)
        return cls(boundary, edge, layout.moved_positions)


def span_begin(heads: HeadMap, chosen: int | None = None) -> int | None:
    """First layer of the span, `chosen` or the first one with a global head that matters.

    By the map's sensitivities (`HeadMap.sensitivity`) a head matters that has a tenth of the
    largest; without them every global head does. Rows picked by a head that brings little are no
    better than random ones.
    """
    if chosen is not None:
        if not 0 <= chosen < heads.num_layers or not heads.whole.is_global[chosen].any():
            raise InputError(f"LiveSpan: first_layer {chosen} is not a layer with a global head")
        return chosen
    matters = _heads_that_matter(heads.whole)
    return int(matters.any(1).argmax()) if matters.any() else None


def span_entry_layer(heads: HeadMap, begin: int | None) -> int | None:
    """Layer whose stored hidden states are read; None for no layer, and for the embeddings.

    What a global head brings into a clean row shows in the K and V of later global heads alone, so
    with one such layer, or none, no row enters.
    """
    return begin if begin and begin != heads.whole.last_global_layer else None


def span_start(heads: HeadMap, begin: int | None) -> int | None:
    """Layer from which the span's rows live: `begin`, or the first of all.

    Global heads before `begin`, weak as they are, bring something into the rows too that is missing
    in their stored hidden states. So rows are computed from the embeddings on where there are some.
    """
    if span_entry_layer(heads, begin) is None:
        return begin
    return 0 if heads.whole.is_global[:begin].any() else begin


def probed_heads(heads: HeadMap, layer: int) -> tuple[int, ...] | None:
    """Global heads of `layer` that rows are picked by; None: all of them.

    Those with half of the layer's largest sensitivity: others hardly find rows that these do not.
    """
    own, of_all_ranks = heads.sensitivity, heads.whole.sensitivity
    if own is None or of_all_ranks is None:
        return None
    of_all_ranks = of_all_ranks[layer][heads.whole.is_global[layer]]
    if not np.isfinite(of_all_ranks).all():
        return None
    among = heads.is_global[layer]
    strong = among & (own[layer] >= _PICKS * of_all_ranks.max())
    return None if np.array_equal(strong, among) else tuple(np.flatnonzero(strong).tolist())


def _heads_that_matter(heads: HeadMap) -> NDArray[np.bool_]:
    """Global heads with a tenth of the largest sensitivity; all, unless each was measured."""
    sensitivity, is_global = heads.sensitivity, heads.is_global
    if sensitivity is None or not np.isfinite(sensitivity[is_global]).all():
        return is_global
    largest = sensitivity[is_global].max(initial=0.0)
    return is_global & (sensitivity >= _MATTERS * largest)


def span_plan(
    heads: HeadMap,
    start: int | None,
    rows: SpanRows,
    *,
    pick: Pick | None = None,
    refresh_local: bool = True,
    ffn: Callable[[int], FfnRule | None] = lambda layer: None,
) -> tuple[LayerPlan, ...]:
    """Plan that carries `rows.span` from layer `start` to the last layer with a global head.

    In the first, and before it, clean rows have the K and V that are cached; they are replaced in
    later layers, the last included, where the rows end before they attend.

    Parameters
    ----------
    heads : HeadMap
    start : int, optional
        See `span_start`; None without a global head.
    rows : SpanRows
    pick : Pick, optional
        Which rows are kept, in the span's first layer; the edge always is.
    refresh_local : bool
        Whether K and V of local heads are replaced too wherever rows attend, and not those of
        global ones alone; before the span the edge's.
    ffn : callable
        The FFN's rule of a layer.
    """
    last = heads.whole.last_global_layer
    if start is None or last is None:
        return (LayerPlan(rows.boundary, rows.boundary, rows.boundary),) * heads.num_layers
    layers = []
    for layer in range(heads.num_layers):
        live = rows.span if layer >= start else rows.edge
        fresh = rows.span if layer > start else rows.edge
        layers.append(
            LayerPlan(
                live if layer < last else rows.boundary,
                fresh if layer <= last else rows.boundary,
                fresh if refresh_local and 0 < layer < last else rows.boundary,
                ffn(layer) if start <= layer < last else None,
                pick if layer == start < last else None,
            )
        )
    return tuple(layers)
