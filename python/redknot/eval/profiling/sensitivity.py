"""Causal sensitivity: how far the answers move when heads of one layer are made local.

Group testing: a layer's heads are made local together first. Where that moves nothing none of them
matters alone; otherwise the group is halved, down to single heads. Heads whose own output moves
least stay together longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from redknot.eval.profiling.run import LayerRules, SampleRun
from redknot.eval.profiling.state import ProfileState, group_key
from redknot.heads import HeadMap

__all__ = ["Group", "first_groups", "halves", "local_heads_map", "measure_groups"]

# A layer, and KV heads of it by rising local shift.
Group: TypeAlias = "tuple[int, tuple[int, ...]]"


def first_groups(local_shift: NDArray, *, alone: bool) -> list[Group]:
    """Groups to begin with: every layer, or every head."""
    groups: list[Group] = []
    for layer, shifts in enumerate(local_shift):
        heads = tuple(int(head) for head in np.argsort(shifts, kind="stable"))
        groups += [(layer, (head,)) for head in heads] if alone else [(layer, heads)]
    return groups


def halves(group: Group) -> list[Group]:
    """Split a group in two."""
    layer, heads = group
    middle = len(heads) // 2
    return [(layer, heads[:middle]), (layer, heads[middle:])]


def local_heads_map(
    shape: tuple[int, int], layer: int, heads: Sequence[int], window: int, sink: int
) -> HeadMap:
    """Every head global but some of one layer."""
    classes = [["global"] * shape[1] for _ in range(shape[0])]
    for head in heads:
        classes[layer][head] = "local"
    return HeadMap(classes, window=window, sink=sink)


def measure_groups(
    run: SampleRun,
    sample: int,
    groups: Sequence[Group],
    state: ProfileState,
    *,
    window: int,
    sink: int,
    progress: Callable[[], None],
) -> None:
    """Measure the groups that `state` lacks for one sample.

    The dense run passes once; each group's run begins at its layer, from the dense hidden states.
    """
    missing = [g for g in groups if str(sample) not in state.groups.get(group_key(*g), {})]
    for _ in range(len(groups) - len(missing)):
        progress()
    if not missing:
        return
    decoder = run.decoder
    shape = (decoder.shape.num_layers, decoder.shape.num_kv_heads)
    run.cache_documents()
    dense = run.run(run.dense_rules)
    last = max(layer for layer, _ in missing)
    for step in run.dense_layers():
        for layer, heads in missing:
            if layer != step.layer:
                continue
            rules = LayerRules.of(local_heads_map(shape, layer, heads, window, sink), decoder)
            answers = run.compare(dense, run.run(rules, step.hidden, layer))
            state.groups.setdefault(group_key(layer, heads), {})[str(sample)] = answers.kl
            state.save()
            progress()
        if step.layer == last:
            return
