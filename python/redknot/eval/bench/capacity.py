"""How many sessions a fixed pool admits, head-aware beside monolithic, and how fast they decode.

The pool holds 16 monolithic sessions (24 without `--quick`) of a slice of layers that keeps the
global fraction of the published head map; KV heads, page size and lengths are the model's. Head
dimension and hidden size are small: they scale bytes and time alike, and no count of sessions
depends on them. Sessions are admitted by the engine until it refuses one, each with a question and
with room for its whole answer. The first ones are recovered by computing; of those that follow only
the pages are taken, the same ones by the same calls, and `computed` says how many were which.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from redknot.engine import Engine
from redknot.engine.admission import Admitted
from redknot.errors import BudgetError
from redknot.eval.bench.decode_batch import decode_rows
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row
from redknot.heads import HeadMap
from redknot.recovery import Dense, Policy, RedKnot

__all__ = ["CapacityRow", "run"]

_HEAD_DIM, _HIDDEN, _VOCAB, _KV_HEADS, _PAGE_SIZE = 16, 64, 256, 8, 64
_DOCUMENTS, _QUESTION_TOKENS, _ANSWER_TOKENS = 8, 64, 960
_MOST_SESSIONS = 2000  # where everything is shared the end is far away

# Global KV heads in each layer of the slice, after the published maps: Qwen3-32B has 4 or 5 of 8 in
# the last quarter of its layers (15.0 % in all), Llama-70B 4 of 8 there (12.5 %), Mistral-7B all in
# five layers of eight, the first ones (62.5 %).
_SLICES = {
    "Mistral-7B": ((8, 8, 8, 8, 8, 0, 0, 0), 4096),
    "Qwen3-32B": ((0, 0, 0, 5), 4096),
    "Llama-3.3-70B": ((0, 0, 0, 4), 8192),
}
_SINK = 4


@dataclass(frozen=True)
class CapacityRow(Row):
    """One pool filled; `figures` stand in the JSON as fields of the row."""

    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        row = super().to_dict()
        return {**row.pop("figures"), **row}


def run(options: Options, roofs: Roofs) -> list[Row]:
    """Fill the pools, then decode a ragged batch."""
    rows: list[Row] = []
    for name, context, windows in _cases(options):
        globals_per_layer, own_window = _SLICES[name]
        for window in windows or (own_window,):
            if window < context:
                rows += _Pool(name, globals_per_layer, context, window, options).rows()
    return [*rows, *decode_rows(options, roofs)]


def _cases(options: Options) -> list[tuple[str, int, tuple[int, ...]]]:
    """(model, context, windows); no windows: the published one."""
    if options.quick:
        return [("Llama-3.3-70B", 32_768, (1024,)), ("Qwen3-32B", 8192, ())]
    names = options.models or tuple(_SLICES)
    contexts = options.contexts or (8192, 32_768, 131_072)
    cases: list[tuple[str, int, tuple[int, ...]]] = []
    for name in names:
        for context in contexts:
            cases.append((name, context, ()))
            if name != "Mistral-7B":
                cases.append((name, context, (256, 1024)))
    return cases


class _Pool:
    """One model, context and window: the same pool filled in every way."""

    def __init__(
        self,
        name: str,
        globals_per_layer: tuple[int, ...],
        context: int,
        window: int,
        options: Options,
    ) -> None:
        self.name, self.context, self.window, self.options = name, context, window, options
        classes = [["global"] * g + ["local"] * (_KV_HEADS - g) for g in globals_per_layer]
        self.heads = HeadMap(classes, window=window, sink=_SINK)
        self.num_rows = len(classes) * _KV_HEADS
        self.num_monolithic = 16 if options.quick else 24
        # Prompt and answer, a ragged page for each document, the prefix and the question.
        pages = -(-(context + _ANSWER_TOKENS) // _PAGE_SIZE) + _DOCUMENTS + 2
        page_bytes = 2 * _PAGE_SIZE * _HEAD_DIM * options.torch_dtype.itemsize
        self.budget = self.num_monolithic * pages * self.num_rows * page_bytes
        self.model = _model(len(classes), context, options)
        self.rng = np.random.default_rng(0)
        body = context - 1 - _QUESTION_TOKENS
        self.lengths = np.diff(np.linspace(0, body, _DOCUMENTS + 1).astype(int)).tolist()

    def rows(self, computed: int = 1) -> list[CapacityRow]:
        """Monolithic sessions, then the three ways to share documents.

        So many sessions of each are recovered by computing.
        """
        engine = self._engine(self.heads)
        documents = self._documents(engine)
        engine.prefill(documents, self._question())  # computed once, so that it can be replayed
        monolithic = self._fill(engine, lambda: documents, Dense(), computed=0, share=False)
        rows: list[CapacityRow] = []
        for shared in ("none", "same_order", "any_order"):
            engine.clear()
            documents = self._documents(engine) if shared != "none" else []

            def order(engine: Engine = engine, shared: str = shared, docs: Any = documents) -> Any:
                if shared == "none":
                    return self._documents(engine)
                return docs if shared == "same_order" else self.rng.permutation(docs).tolist()

            filled = self._fill(
                engine, order, RedKnot(), computed=computed, share=shared == "same_order"
            )
            rows.append(self._row(shared, filled, monolithic))
        return rows

    def _engine(self, heads: HeadMap) -> Engine:
        engine = Engine(self.model, heads, kv_budget=self.budget, page_size=_PAGE_SIZE, chat=False)
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
        replay = _Replay(engine)
        try:
            while len(admitted) < _MOST_SESSIONS:
                self.options.progress(f"capacity {self.name} {self.context}: {len(admitted)}")
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
            filled = _Filled(len(admitted), min(computed, len(admitted)), _MOST_SESSIONS)
            filled.account(engine)
            filled.seconds_per_step = _decode_seconds(engine, admitted)
            return filled
        finally:
            replay.close()
            for one in admitted:
                engine.pool.allocator.release_session(one.session)

    def _row(self, shared: str, filled: _Filled, monolithic: _Filled) -> CapacityRow:
        fraction = self.heads.global_fraction
        kept = min(1.0, (self.window + _SINK) / (self.context + _ANSWER_TOKENS))
        ceiling = {
            "none": 1 / (fraction + (1 - fraction) * kept),
            "any_order": 1 / fraction,
            "same_order": None,
        }[shared]
        ratio = filled.sessions / monolithic.sessions
        beside = "" if ceiling is None else f", formula {ceiling:.1f}x"
        return CapacityRow(
            kind="capacity",
            heads="mixed",
            shape=f"{self.name} {self.context} window {self.window} {shared}: {filled.sessions} "
            f"sessions, {ratio:.1f}x{beside}",
            time_ms=1e3 * filled.seconds_per_step,
            spread_ms=0.0,
            figures={
                "model": self.name,
                "context": self.context,
                "window": self.window,
                "sink": _SINK,
                "global_fraction": fraction,
                "shared_documents": shared,
                "sessions": filled.sessions,
                "sessions_monolithic": monolithic.sessions,
                "ratio": ratio,
                "ratio_formula": ceiling,
                "stopped_before_full": filled.sessions >= filled.limit,
                "computed": filled.computed,
                "pages": filled.pages,
                "tokens_per_second": filled.sessions / filled.seconds_per_step,
                "tokens_per_second_monolithic": monolithic.sessions / monolithic.seconds_per_step,
                "layers": self.heads.num_layers,
                "num_kv_heads": _KV_HEADS,
                "head_dim": _HEAD_DIM,
                "page_size": _PAGE_SIZE,
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
    """Lets prefills and offline passes return what the last computed one of their kind returned.

    Pages are found, taken and released by the same calls; only their contents are not computed.
    """

    def __init__(self, engine: Engine) -> None:
        self.skips = False
        self._runner: Any = engine._runner
        for name in ("prefill", "encode", "extend"):
            setattr(self._runner, name, self._around(name, getattr(self._runner, name)))

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        cache = self._runner.__dict__.setdefault("_replayed", {})

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.skips or name not in cache:
                cache[name] = real(*args, **kwargs)
            elif name == "extend":  # appends are part of the admission
                sessions, _, num_tokens, _ = args
                pool = self._runner.pool
                pool.copy(pool.allocator.append_tokens(sessions, num_tokens, expire_first=True))
            return cache[name]

        return call

    def close(self) -> None:
        """Compute everything from now on."""
        for name in ("prefill", "encode", "extend"):
            self._runner.__dict__.pop(name, None)


def _decode_seconds(engine: Engine, admitted: list[Admitted]) -> float:
    """Median time of a step in which every session decodes one token."""
    sessions, rules = [one.session for one in admitted], [one.rules for one in admitted]
    token_ids = torch.full((len(sessions),), 5)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        engine._runner.decode(sessions, token_ids, rules)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


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
