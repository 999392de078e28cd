"""How many sessions a fixed pool admits, head-aware beside monolithic, and how fast they decode.

The pool holds exactly 16 monolithic sessions of a slice of layers that keeps the global fraction of
the published head map; KV heads, page size and lengths are the model's. Head dimension and hidden
size are small: they scale bytes and time alike, and no count of sessions depends on them. Sessions
are admitted by the engine until it refuses one, each with a question and with room for its whole
answer. The first one of a model and a context up to 32K is recovered by computing; of those that
follow only the pages are taken, the same ones by the same calls, and `computed` says how many were
which. One case more, of 32 sessions and small pages, shows what is lost to whole pages and to the
documents of the newest session, which lie in the pool as a whole while it is recovered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from redknot.engine import Engine
from redknot.engine.admission import Admitted
from redknot.engine.runner import HeadRules, LayerTrace, Prompt
from redknot.errors import BudgetError
from redknot.eval.bench import decode_step
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row
from redknot.heads import HeadMap
from redknot.recovery import Dense, Epic, Policy, RedKnot

__all__ = ["CapacityRow", "run"]

_HEAD_DIM, _HIDDEN, _VOCAB, _KV_HEADS = 8, 64, 256, 8
_DOCUMENTS, _QUESTION_TOKENS, _ANSWER_TOKENS = 8, 64, 960
_PAGE_SIZE, _SMALL_PAGE_SIZE = 64, 16
_MOST_RATIO, _QUICK_MOST_RATIO = 25, 40  # where everything is shared the end is far away
_SESSIONS, _MORE_SESSIONS = 16, 32  # monolithic ones that fill the pool
_LONGEST_COMPUTED = 32_768  # of longer contexts no recovery is computed: minutes each
_MOST_STEPS, _DECODE_SECONDS = 3, 0.5

# Global KV heads in each layer of the slice, after the published maps: Qwen3-32B has 4 or 5 of 8 in
# the last 14 of its 64 layers (15.0 % in all), Llama-70B 4 of 8 in the last quarter (12.5 %),
# Mistral-7B all in five layers of eight, the first ones (62.5 %).
_SLICES = {
    "Mistral-7B": ((8, 8, 4, 0), 4096),
    "Qwen3-32B": ((0, 0, 0, 1, 5), 4096),
    "Llama-3.3-70B": ((0, 0, 0, 4), 8192),
}
_SINK = 4
# Whose documents sessions share, and what is recovered: all rows of the global heads, or the first
# rows of each document, of all heads, which keep everything.
_WAYS: tuple[tuple[str, Policy], ...] = (
    ("none", RedKnot()),
    ("same_order", RedKnot()),
    ("any_order", RedKnot()),
    ("any_order", Epic()),
)


@dataclass(frozen=True)
class CapacityRow(Row):
    """One pool filled; `figures` stand in the JSON as fields of the row."""

    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        row = super().to_dict()
        return {**row.pop("figures"), **row}


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Fill the pools; without chosen contexts, decode a ragged batch too (see `decode`)."""
    rows: list[Row] = []
    cases = list(_cases(options))
    for number, (name, context, windows, page_size, sessions) in enumerate(cases, 1):
        told = replace(options, progress=_numbered(options, number, len(cases)))
        globals_per_layer, own_window = _SLICES[name]
        pool = _Pool(name, globals_per_layer, context, told, page_size, sessions)
        for window in windows or (own_window,):
            if window < context:
                rows += pool.rows(window)
    return rows if options.contexts else [*rows, *decode_step.run(options, roofs)]


def _numbered(options: Options, number: int, count: int) -> Callable[[str], None]:
    return lambda line: options.progress(f"[{number}/{count}] {line}")


def _cases(options: Options) -> Iterator[tuple[str, int, tuple[int, ...], int, int]]:
    """(model, context, windows, page size, monolithic sessions); no windows: the published one."""
    if options.quick:
        yield "Llama-3.3-70B", 32_768, (1024,), _PAGE_SIZE, _SESSIONS
        yield "Qwen3-32B", 8192, (), _PAGE_SIZE, _SESSIONS
        return
    for name in options.models or tuple(_SLICES):
        for context in options.contexts or (8192, 32_768, 131_072):
            yield name, context, (_SLICES[name][1], 1024, 256), _PAGE_SIZE, _SESSIONS
            if context == 32_768:
                yield name, context, (1024,), _SMALL_PAGE_SIZE, _MORE_SESSIONS


class _Pool:
    """One model and context: the same pool filled in every way."""

    def __init__(
        self,
        name: str,
        globals_per_layer: tuple[int, ...],
        context: int,
        options: Options,
        page_size: int | None = None,
        sessions: int = _SESSIONS,
    ) -> None:
        self.name, self.context, self.options = name, context, options
        self.globals_per_layer = globals_per_layer
        self.page_size = page_size or _PAGE_SIZE
        self.num_rows = len(globals_per_layer) * _KV_HEADS
        self.num_monolithic = sessions
        pages = -(-(context + _ANSWER_TOKENS) // self.page_size)
        page_bytes = 2 * self.page_size * _HEAD_DIM * options.torch_dtype.itemsize
        self.budget = self.num_monolithic * pages * self.num_rows * page_bytes
        self.model = _model(len(globals_per_layer), context, options)
        self.rng = np.random.default_rng(0)
        body = context - 1 - _QUESTION_TOKENS
        self.lengths = np.diff(np.linspace(0, body, _DOCUMENTS + 1).astype(int)).tolist()
        self._monolithic: _Filled | None = None

    def rows(self, window: int, computed: int = 1) -> list[CapacityRow]:
        """Monolithic sessions, then the ways to share documents, the last one with few rows anew.

        So many sessions of the first way, and of the pool's first window, are recovered by
        computing; with more than one, of every way and window.
        """
        classes = [["global"] * g + ["local"] * (_KV_HEADS - g) for g in self.globals_per_layer]
        heads = HeadMap(classes, window=window, sink=_SINK)
        engine = self._engine(heads)
        if computed == 1 and (self._monolithic or self.context > _LONGEST_COMPUTED):
            computed = 0
        if self._monolithic is None:
            self._monolithic = self._fill(
                engine, lambda: self._documents(engine), Dense(), computed=0, share=False
            )
        rows: list[CapacityRow] = []
        for shared, policy in _WAYS:
            engine.clear()
            replay = _Replay(engine)
            replay.skips = not computed
            documents = self._documents(engine) if shared != "none" else []
            replay.close()

            def order(shared: str = shared, docs: Any = documents) -> Any:
                if shared == "none":
                    return self._documents(engine)
                return docs if shared == "same_order" else self.rng.permutation(docs).tolist()

            filled = self._fill(
                engine, order, policy, computed=computed, share=shared == "same_order"
            )
            rows.append(self._row(heads, window, shared, policy, filled, self._monolithic))
            computed = computed if computed > 1 else 0
        return rows

    def _engine(self, heads: HeadMap) -> Engine:
        engine = Engine(
            self.model, heads, kv_budget=self.budget, page_size=self.page_size, chat=False
        )
        for pages in (engine.pool.k_cache, engine.pool.v_cache):
            pages.fill_(0.01)  # every page is real memory before anything is timed
        return engine

    def _documents(self, engine: Engine) -> list[str]:
        return [engine.add(self.rng.integers(2, _VOCAB, n)) for n in self.lengths]

    def _question(self) -> np.ndarray:
        return self.rng.integers(2, _VOCAB, _QUESTION_TOKENS)

    def _fill(
        self,
        engine: Engine,
        documents: Callable[[], list[str]],
        policy: Policy,
        *,
        computed: int,
        share: bool,
    ) -> _Filled:
        """Admit sessions until the pool refuses one, then decode with all of them."""
        admitted: list[Admitted] = []
        most = _QUICK_MOST_RATIO if self.options.quick else _MOST_RATIO
        limit = most * self.num_monolithic
        replay = _Replay(engine)
        try:
            while len(admitted) < limit:
                self.options.progress(
                    f"{self.name} {self.context} {policy.name}: {len(admitted)} sessions"
                )
                replay.skips = len(admitted) >= computed
                reserved = {one.session: _ANSWER_TOKENS for one in admitted}
                try:
                    admitted.append(
                        engine._admission.admit(
                            documents(),
                            self._question(),
                            policy,
                            new_tokens=_ANSWER_TOKENS,
                            reserved=reserved,
                            share_recovered=share,
                        )
                    )
                except BudgetError:
                    break
            replay.close()
            filled = _Filled(len(admitted), min(computed, len(admitted)), limit)
            filled.account(engine)
            filled.seconds_per_step = _decode_seconds(engine, admitted)
            return filled
        finally:
            replay.close()
            for one in admitted:
                engine.pool.allocator.release_session(one.session)

    def _row(
        self,
        heads: HeadMap,
        window: int,
        shared: str,
        policy: Policy,
        filled: _Filled,
        monolithic: _Filled,
    ) -> CapacityRow:
        fraction = heads.global_fraction
        kept = min(1.0, (window + _SINK) / (self.context + _ANSWER_TOKENS))
        ceiling = {
            "none": 1 / (fraction + (1 - fraction) * kept),
            "any_order": 1 / fraction,
            "same_order": None,
        }[shared]
        if not isinstance(policy, RedKnot):
            ceiling = None
        ratio = filled.sessions / monolithic.sessions
        beside = "" if ceiling is None else f", formula {ceiling:.1f}x"
        return CapacityRow(
            kind="capacity",
            heads="mixed",
            shape=f"{self.name} {self.context} window {window} {shared}, {policy.name}: "
            f"{filled.sessions} sessions, {ratio:.1f}x{beside}",
            time_ms=1e3 * filled.seconds_per_step,
            spread_ms=0.0,
            figures={
                "model": self.name,
                "context": self.context,
                "window": window,
                "sink": _SINK,
                "global_fraction": fraction,
                "shared_documents": shared,
                "policy": policy.name,
                "sessions": filled.sessions,
                "sessions_monolithic": monolithic.sessions,
                "ratio": ratio,
                "ratio_formula": ceiling,
                "share_of_formula": None if ceiling is None else ratio / ceiling,
                "stopped_before_full": filled.sessions >= filled.limit,
                "computed": filled.computed,
                "pages": filled.pages,
                "tokens_per_second": filled.sessions / filled.seconds_per_step,
                "tokens_per_second_monolithic": monolithic.sessions / monolithic.seconds_per_step,
                "layers": heads.num_layers,
                "num_kv_heads": _KV_HEADS,
                "head_dim": _HEAD_DIM,
                "page_size": self.page_size,
                "documents": _DOCUMENTS,
                "question_tokens": _QUESTION_TOKENS,
                "answer_tokens": _ANSWER_TOKENS,
                "pool_bytes": self.budget,
            },
        )


@dataclass
class _Filled:
    """A full pool."""

    sessions: int
    computed: int
    limit: int
    pages: dict[str, int] = field(default_factory=dict)
    seconds_per_step: float = 0.0

    def account(self, engine: Engine) -> None:
        """Take the pages by class, which must be all that the pool has."""
        stats = engine.kv_stats()
        classes = ("segment_pages", "session_global_pages", "session_local_pages", "num_free_pages")
        self.pages = {name: stats[name] for name in classes}  # type: ignore[literal-required]
        held = len(engine.pool.k_cache) - engine.pool.allocator.free_pages()
        if held != sum(self.pages.values()) - self.pages["num_free_pages"]:
            raise AssertionError(f"{held} pages are held, the accounting says {self.pages}")


class _Replay:
    """Lets prefills and offline passes do all that concerns pages, and compute nothing.

    Pages are found, taken and released by the same calls; only their contents are not written.
    """

    def __init__(self, engine: Engine) -> None:
        self.skips = False
        self._runner: Any = engine._runner
        self._skipped: dict[str, Callable[..., Any]] = {
            "prefill": self._prefill,
            "encode": self._encode,
            "extend": self._extend,
        }
        for name, skipped in self._skipped.items():
            setattr(self._runner, name, self._around(getattr(self._runner, name), skipped))

    def _around(self, real: Callable[..., Any], skipped: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (skipped if self.skips else real)(*args, **kwargs)

    def _prefill(self, session: int, prompt: Prompt, rules: HeadRules, **options: Any) -> Any:
        rows: dict[int, torch.Tensor] = {}  # layers that agree share one

        def tensor(positions: np.ndarray) -> torch.Tensor:
            return rows.setdefault(id(positions), torch.from_numpy(positions))

        trace = [
            LayerTrace(tensor(step.live), tensor(step.fresh), tensor(step.fresh_local))
            for step in prompt.plan.layers
        ]
        return torch.zeros(_VOCAB), trace

    def _encode(self, *args: Any, **options: Any) -> None:
        return None

    def _extend(self, sessions: Any, token_ids: Any, num_tokens: Any, rules: Any) -> torch.Tensor:
        pool = self._runner.pool  # appends are part of the admission
        pool.copy(pool.allocator.append_tokens(sessions, num_tokens, expire_first=True))
        return torch.zeros(len(sessions), _VOCAB)

    def close(self) -> None:
        """Compute everything from now on."""
        for name in self._skipped:
            self._runner.__dict__.pop(name, None)


def _decode_seconds(engine: Engine, admitted: list[Admitted]) -> float:
    """Median time of a step in which every session decodes one token."""
    sessions, rules = [one.session for one in admitted], [one.rules for one in admitted]
    token_ids = torch.full((len(sessions),), 5)
    times: list[float] = []
    while len(times) <= _MOST_STEPS and sum(times) < _DECODE_SECONDS:
        started = time.perf_counter()
        engine._runner.decode(sessions, token_ids, rules)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:] or times))  # the first one warms up, where there are more


def _model(num_layers: int, context: int, options: Options) -> Any:
    """Random weights, as many KV heads and layers as the slice has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=_HIDDEN,
        num_hidden_layers=num_layers,
        num_attention_heads=_KV_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=2 * context,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.eval().to(options.torch_dtype)
