"""`profile_heads`: measure which heads of a model need the whole context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redknot.engine.prompt import PromptFormat
from redknot.errors import InputError
from redknot.eval.profiling.calibration import Calibration, Text, make_calibration
from redknot.eval.profiling.head_profile import HeadProfile, ModelFacts, Rung
from redknot.eval.profiling.mass import distance_grid
from redknot.eval.profiling.run import LayerRules, SampleRun
from redknot.eval.profiling.sensitivity import Group, first_groups, halves, measure_groups
from redknot.eval.profiling.signals import measure_signals
from redknot.eval.profiling.state import ProfileState, group_key
from redknot.heads import HeadMap
from redknot.models import Decoder, checkpoint_fingerprint

__all__ = ["METHODS", "Progress", "profile_heads"]

METHODS = ("grouped", "alone", "signals")
# What is going on, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def profile_heads(
    model: Any,
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    method: str = "grouped",
    context_tokens: int = 4096,
    document_tokens: int | None = None,
    answer_tokens: int = 64,
    max_samples: int | None = 8,
    window: int | None = None,
    sink: int = 4,
    coverage: float = 0.95,
    min_kl: float = 0.002,
    mass_rows: int = 256,
    run_maps: bool = True,
    prefix: Any = None,
    chat: bool | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> HeadProfile:
    """Measure every head of a model on calibration texts.

    Three signals per head: the attention mass by distance; how far its output for a document moves
    when others stand before it; and how far the *answers* move (KL from dense) when that head alone
    is made local and keeps the K and V that were cached with the document alone. Then whole maps
    are run, with more and more of the highest heads global. Memory is that of one prompt's K/V and
    a few hidden states, whatever the length.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported family; it is not changed.
    tokenizer : PreTrainedTokenizerBase or None
        None: the texts' documents, questions and answers are token ids.
    texts : iterable of str or mapping
        Plain texts, cut into documents with what follows as answer; or mappings with `documents`
        (a list), `question` and `answer`.
    method : {"grouped", "alone", "signals"}
        How causal sensitivity is measured: by group testing, or for each head alone, or not at all.
    context_tokens, document_tokens, answer_tokens : int
        How plain texts are cut; documents are a quarter of the context (512 at most) by default.
    max_samples : int, optional
        More are thinned out evenly; None: all.
    window, sink : int
        What a local head sees while sensitivity is measured. The window is by default the largest
        power of two with sink + window within an eighth of the context.
    coverage : float
        Windows of whole maps cover this share of each head's mass; see `HeadProfile.local_windows`.
    min_kl : float
        Nats per answer token below which heads count as without effect.
    mass_rows : int
        Rows of each context whose attention mass is taken, evenly spaced.
    run_maps : bool
        Whether whole maps are run, as `classify(max_kl=)` and `(max_loss_points=)` need.
    prefix, chat
        As for `Engine`.
    state : path, optional
        File that keeps what was measured; removed at the end.
    resume : bool
        Go on from `state` if it exists.
    progress : callable, optional
        Called with (phase, done, total).

    Returns
    -------
    HeadProfile

    Raises
    ------
    InputError, ModelError
        Before anything is computed.

    References
    ----------
    Edge mass and prefix shift: RedKnot, arXiv 2606.06256.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (
        ("context_tokens", context_tokens), ("answer_tokens", answer_tokens), ("sink", sink + 1),
        ("mass_rows", mass_rows), ("max_samples", max_samples or 1), ("window", window or 1),
        ("document_tokens", document_tokens or 1),
    ):  # fmt: skip
        if value < 1:
            raise InputError(f"{name} is too small: {value - (name == 'sink')}")
    decoder = Decoder(model)
    calibration = make_calibration(
        texts,
        PromptFormat(tokenizer, model.config, prefix=prefix, chat=chat),
        context_tokens=context_tokens,
        document_tokens=document_tokens or min(512, context_tokens // 4),
        answer_tokens=answer_tokens,
        max_samples=max_samples,
    )
    if calibration.longest > decoder.max_context:
        raise InputError(
            f"a calibration prompt has {calibration.longest} tokens, more than the model's "
            f"context of {decoder.max_context}"
        )
    context = max(sample.context_tokens for sample in calibration.samples)
    window = window or _default_window(context, sink)
    work = _Profiling(
        decoder,
        calibration,
        facts=_facts(model, decoder),
        method=method,
        window=window,
        sink=sink,
        coverage=coverage,
        min_kl=min_kl,
        mass_rows=mass_rows,
        run_maps=run_maps and method != "signals",
        progress=progress or (lambda phase, done, total: None),
        state_path=state,
    )
    if resume:
        work.state.resume()
    try:
        profile = work.run()
    except BaseException:
        work.state.save(at_once=True)
        raise
    work.state.delete()
    return profile


def _default_window(context: int, sink: int) -> int:
    room = max(context // 8 - sink, 1)
    return 1 << (room.bit_length() - 1)


def _facts(model: Any, decoder: Decoder) -> ModelFacts:
    return ModelFacts(
        name=str(getattr(model.config, "name_or_path", "") or ""),
        fingerprint=checkpoint_fingerprint(model),
        shape=decoder.shape,
        bytes_per_element=decoder.dtype.itemsize,
        sliding_windows=list(decoder.sliding_windows),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("redknot", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


class _Profiling:
    """One profile in the making."""

    def __init__(
        self,
        decoder: Decoder,
        calibration: Calibration,
        *,
        facts: ModelFacts,
        method: str,
        window: int,
        sink: int,
        coverage: float,
        min_kl: float,
        mass_rows: int,
        run_maps: bool,
        progress: Progress,
        state_path: str | Path | None,
    ) -> None:
        self.decoder, self.samples = decoder, calibration.samples
        self.calibration, self.facts = calibration, facts
        self.method, self.window, self.sink = method, window, sink
        self.coverage, self.min_kl = coverage, min_kl
        self.mass_rows, self.run_maps, self.progress = mass_rows, run_maps, progress
        self.grid = distance_grid(calibration.longest)
        self.shape = (decoder.shape.num_layers, decoder.shape.num_kv_heads)
        header = {
            "model_fingerprint": facts.fingerprint,
            "dtype": str(decoder.dtype),
            "calibration": calibration.digest,
            "window": window,
            "sink": sink,
            "mass_rows": mass_rows,
            "coverage": coverage,
        }
        self.state = ProfileState(header, state_path)

    def run(self) -> HeadProfile:
        """Measure what is missing; one phase after the other."""
        self._signals()
        profile = self._profile()
        if self.method == "signals":
            return profile
        groups = self._sensitivity(profile.score("local_shift"))
        profile = self._with_kl(profile, groups)
        return self._with_rungs(profile) if self.run_maps else profile

    def _counter(self, phase: str, total: int) -> Callable[[], None]:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.progress(phase, done, total)

        return step

    # --- phases -----------------------------------------------------------------------------------

    def _signals(self) -> None:
        step = self._counter("signals", len(self.samples) * self.shape[0])
        all_local = LayerRules.of(
            HeadMap.all_local(*self.shape, window=self.window, sink=self.sink), self.decoder
        )
        for number, sample in enumerate(self.samples):
            if number in self.state.signals["samples"]:
                for _ in range(self.shape[0]):
                    step()
                continue
            sums = measure_signals(
                SampleRun(self.decoder, sample),
                all_local,
                self.grid,
                sink=self.sink,
                mass_rows=self.mass_rows,
                progress=step,
            )
            self.state.add_signals(number, sums)

    def _profile(self) -> HeadProfile:
        found = {name: np.array(value) for name, value in self.state.signals.items()}
        rows = float(found["rows"][0])
        return HeadProfile(
            model=self.facts,
            calibration=self.calibration.describe(),
            windows=self.grid,
            sink=self.sink,
            window=self.window,
            coverage=self.coverage,
            min_kl=self.min_kl,
            covered=found["covered"] / rows,
            page_share=found["page_share"] / rows,
            prefix_shift=_ratio(found["prefix_moved"], found["prefix_size"]),
            local_shift=_ratio(found["local_moved"], found["local_size"]),
            versions=_versions(),
        )

    def _sensitivity(self, local_shift: NDArray) -> list[tuple[Group, bool]]:
        """Measure groups, round by round; returns those that were not split, and if alone."""
        groups = first_groups(local_shift, alone=self.method == "alone")
        settled: list[tuple[Group, bool]] = []
        number = 1
        while groups:
            step = self._counter(f"sensitivity, round {number}", len(groups) * len(self.samples))
            for index, sample in enumerate(self.samples):
                measure_groups(
                    SampleRun(self.decoder, sample),
                    index,
                    groups,
                    self.state,
                    window=self.window,
                    sink=self.sink,
                    progress=step,
                )
            split: list[Group] = []
            for group in groups:
                alone = len(group[1]) == 1
                if alone or self._group_kl(group) < self.min_kl:
                    settled.append((group, alone))
                else:
                    split += halves(group)
            groups, number = split, number + 1
        return settled

    def _group_kl(self, group: Group, part: slice = slice(None)) -> float:
        """Mean KL per answer token of a group, over some of the samples."""
        chosen = range(len(self.samples))[part]
        found = self.state.groups[group_key(*group)]
        tokens = sum(self.samples[i].num_answer_tokens for i in chosen)
        return sum(found[str(i)] for i in chosen) / tokens if tokens else float("nan")

    def _with_kl(self, profile: HeadProfile, groups: list[tuple[Group, bool]]) -> HeadProfile:
        kl, alone = np.zeros(self.shape), np.zeros(self.shape, dtype=bool)
        by_set = np.zeros((2, *self.shape))
        for group, is_alone in groups:
            layer, heads = group
            index = list(heads)
            kl[layer, index] = self._group_kl(group) / len(heads)
            alone[layer, index] = is_alone
            for number in range(2):
                part = self._group_kl(group, slice(number, None, 2))
                by_set[number, layer, index] = part / len(heads)
        values = {**profile.__dict__, "kl": kl, "kl_by_set": by_set, "measured_alone": alone}
        return HeadProfile(**values)

    def _with_rungs(self, profile: HeadProfile) -> HeadProfile:
        """Run whole maps with 0 to 8, 12, 16, 24, ... global heads, and with all of them."""
        size = self.shape[0] * self.shape[1]
        counts = sorted({*range(9), *distance_grid(size)} - set(range(size // 2 + 1, size)))
        step = self._counter("whole maps", len(counts) * len(self.samples))
        for index, sample in enumerate(self.samples):
            missing = [n for n in counts if str(index) not in self.state.rungs.get(str(n), {})]
            for _ in range(len(counts) - len(missing)):
                step()
            if not missing:
                continue
            run = SampleRun(self.decoder, sample)
            run.cache_documents()
            dense = run.run(run.dense_rules)
            for count in missing:
                rules = LayerRules.of(profile.head_map(count), self.decoder)
                answers = run.compare(dense, dense if count == size else run.run(rules))
                self.state.rungs.setdefault(str(count), {})[str(index)] = [
                    answers.kl, answers.nll, answers.correct,
                ]  # fmt: skip
                self.state.save()
                step()
        tokens = sum(sample.num_answer_tokens for sample in self.samples)
        rungs = []
        for count in counts:
            sums = np.sum(
                [self.state.rungs[str(count)][str(i)] for i in range(len(self.samples))], 0
            )
            rungs.append(Rung(count, *(float(value) / tokens for value in sums)))
        return HeadProfile(**{**profile.__dict__, "rungs": rungs})


def _ratio(moved: NDArray, size: NDArray) -> NDArray:
    return moved / np.maximum(size, 1e-12)
