"""What an evaluation compares: policies by name with options, and the controls that must fail."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redknot.engine import Engine
from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.recovery import POLICIES, Dense, LiveSpan, Policy, RandomRows, RedKnot
from redknot.recovery.plan import SIGNALS

__all__ = [
    "DEFAULT_POLICIES",
    "Candidate",
    "build_candidates",
    "ffn_signal_policies",
    "other_heads",
    "parse_policy",
]

# CacheBlend twice: as published, and with the tokens picked where a global head has acted.
DEFAULT_POLICIES = (
    "dense",
    "naive",
    "epic",
    "cacheblend",
    "cacheblend:pick_layer=after_first_global",
    "duoattention",
    "redknot",
    "live_span",
)


@dataclass(frozen=True)
class Candidate:
    """A policy on an engine, under the name it has in the tables."""

    label: str
    policy: Policy
    engine: Engine
    is_control: bool = False

    @property
    def global_fraction(self) -> float:
        """Share of KV heads that see everything while decoding."""
        return self.policy.effective_heads(self.engine.heads).global_fraction


def parse_policy(text: str) -> Policy:
    """Make a policy from ``name`` or ``name:option=value:option=value``.

    Raises
    ------
    InputError
        For a name or option that does not exist, or a value that the policy refuses.
    """
    name, *options = text.strip().split(":")
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    fields = {field.name for field in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise InputError(f"policy {name} has no option {option!r}; it has {known} (key=value)")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value  # a word such as after_first_global
    return POLICIES[name](**given)


def build_candidates(
    engine_for: Callable[[HeadMap], Engine],
    heads: HeadMap,
    policies: Sequence[tuple[str, Policy]],
    *,
    controls: bool = False,
) -> list[Candidate]:
    """Candidates on one engine, dense first; with `controls`, those that must fail behind them.

    `engine_for` makes an engine under a head map. The controls' budgets are those of what they
    control: as many rows by chance, as many global heads that the map does not name, and none.
    """
    labels = [label for label, _ in policies]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"policy {min(repeated)!r} is given twice")
    engine = engine_for(heads)
    found = [Candidate("dense", Dense(), engine)]
    found += [Candidate(label, p, engine) for label, p in policies if label != "dense"]
    if controls:
        wrong, none = engine_for(other_heads(heads)), engine_for(_no_global_heads(heads))
        ours = LiveSpan()
        share = ours.row_fraction + ours.read_fraction + ours.early_fraction
        found += [
            Candidate("random rows", RandomRows(row_fraction=share), engine, True),
            Candidate("redknot, wrong heads", RedKnot(), wrong, True),
            Candidate("live_span, wrong heads", LiveSpan(), wrong, True),
            Candidate("redknot, no global heads", RedKnot(), none, True),
        ]
    return found


def ffn_signal_policies(num_tokens: int) -> list[tuple[str, Policy]]:
    """RedKnot with a sparse FFN behind layer 0, by each signal at several shares of the rows.

    Shares of rows are those of a prompt of `num_tokens`; shares of mass are the published way to
    choose, for the published signal. No row is kept for being recent: the signal alone decides.
    """
    found: list[tuple[str, Policy]] = []
    for signal in SIGNALS:
        for share in (0.05, 0.1, 0.2, 0.4):
            policy = RedKnot(
                dense_until=1,
                ffn_mass=1e-6,
                min_keep=max(1, round(share * num_tokens)),
                recent_n=0,
                signal=signal,
            )
            found.append((f"ffn {signal} {share:.0%} of rows", policy))
    for mass in (0.2, 0.5, 0.8):
        policy = RedKnot(dense_until=1, ffn_mass=mass, recent_n=0)
        found.append((f"ffn attention_norm mass {mass}", policy))
        policy = RedKnot(dense_until=1, ffn_mass=mass, recent_n=0, signal="foreign")
        found.append((f"ffn foreign mass {mass}", policy))
    return found


def other_heads(heads: HeadMap) -> HeadMap:
    """As many global heads in each layer, none of which `heads` has: a control that must fail."""
    classes = np.array(heads.classes)
    for layer, row in enumerate(heads.is_global):
        classes[layer] = "local"
        classes[layer, np.flatnonzero(~row)[: row.sum()]] = "global"
    return _with_local_rule(heads, classes)


def _no_global_heads(heads: HeadMap) -> HeadMap:
    return _with_local_rule(heads, np.full_like(np.array(heads.classes), "local"))


def _with_local_rule(heads: HeadMap, classes: np.ndarray) -> HeadMap:
    """`classes` with the largest window and sink that `heads` gives a local head."""
    local = ~heads.is_global
    if not local.any():
        raise InputError("the head map has no local head: there is nothing to compare with")
    window, sink = int(heads.windows[local].max()), int(heads.sinks[local].max())
    return HeadMap(classes.tolist(), window=window, sink=sink)
