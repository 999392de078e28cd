"""Retrieval heads: which pages they read, and that they attend to exactly those."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from paged_case import assert_close, paged_rows
from reference.attention import Rows, attention, rotate
from tiny_models import random_tokens, tiny_model

from redknot import Engine, HeadMap
from redknot.cache.page_selection import PageSelector, select_pages

INV_FREQ = 1e4 ** (-torch.arange(0, 32, 2) / 32)


def oracle(rows: Rows, row: int, top_p: float, scale: float, softcap: float = 0.0) -> list[int]:
    """References that a row's one query reads, by the rule as it is written."""
    num_rows = len(rows.row_window)
    group = rows.q.shape[1] // num_rows
    begin, end = rows.row_indptr[row : row + 2].tolist()
    kept = {begin, end - 1}
    for head in range(row * group, (row + 1) * group):
        scores = []
        for page, _, valid, offset in rows.page_refs[begin:end].tolist():
            keys = [rotate(k, offset, INV_FREQ) for k in rows.k_cache[page, :valid].double()]
            mean = sum(keys) / valid
            score = float(mean @ rows.q[0, head].double()) * scale
            score = softcap * math.tanh(score / softcap) if softcap else score
            scores.append(math.log(valid) + score)
        mass = np.exp(np.array(scores) - max(scores))
        mass /= mass.sum()
        held = 0.0
        for index in np.argsort(-mass):
            if held < top_p:
                kept.add(begin + int(index))
            held += mass[index]
    return sorted(kept)


def case() -> Rows:
    """One query over two KV heads of two query heads; the pages of a moved document are rotated."""
    runs = [(0, 40, 0), (40, 100, 33), (140, 60, -7), (200, 21, 0)]
    rows = paged_rows([runs, runs], [[220]], group=2, page_size=16)
    return replace(rows, q=3 * rows.q)


def choose(selector, rows, indptr=None, refs=None, softcap=0.0):
    return select_pages(
        [selector], [7], [1], 0, rows.q, rows.k_cache,
        rows.row_indptr.numpy() if indptr is None else indptr,
        rows.page_refs.numpy() if refs is None else refs,
        softmax_scale=None, softcap=softcap, inv_freq=INV_FREQ,
    )  # fmt: skip


@pytest.mark.parametrize(("top_p", "softcap"), [(0.3, 0.0), (0.6, 0.0), (0.85, 0.0), (0.6, 1.0)])
def test_the_pages_and_the_attention_are_those_of_the_oracle(top_p, softcap):
    from redknot import ops

    rows = case()
    selector = PageSelector(np.array([[True, False]]), top_p)
    indptr, refs = choose(selector, rows, softcap=softcap)
    first_row = oracle(rows, 0, top_p, 32**-0.5, softcap)
    num_refs = int(rows.row_indptr[1])
    assert 2 < len(first_row) < num_refs
    assert selector.pages_read == len(first_row) and selector.pages_held == num_refs
    wanted = [*first_row, *range(num_refs, 2 * num_refs)]  # head 1 is global: it reads everything
    assert np.array_equal(refs, rows.page_refs.numpy()[wanted])
    chosen = replace(rows, row_indptr=torch.from_numpy(indptr), page_refs=torch.from_numpy(refs))
    out, _ = ops.seg_paged_attention(*chosen.args(), inv_freq=INV_FREQ)
    pages = rows.page_refs[wanted]
    bounds = torch.tensor([0, len(first_row), len(wanted)], dtype=torch.int32)
    want = replace(rows, row_indptr=bounds, page_refs=pages)
    exact, _ = attention(want, inv_freq=INV_FREQ)
    assert_close(out, exact, attention(want, torch.float32, inv_freq=INV_FREQ)[0])


def test_a_page_of_the_mass_is_found_wherever_it_stands():
    rows = case()
    page = int(rows.page_refs[6, 0])
    rows.k_cache[page] = 2 * rotate(rows.q[0, 0] + rows.q[0, 1], -33, INV_FREQ)
    _, refs = choose(PageSelector(np.array([[True, False]]), 0.5), rows)
    num_refs = int(rows.row_indptr[1])
    assert refs[: len(refs) - num_refs, 0].tolist() == [
        int(rows.page_refs[i, 0]) for i in (0, 6, num_refs - 1)
    ]


def test_means_follow_what_is_appended_replaced_and_forgotten():
    rows = case()
    selector = PageSelector(np.array([[True, True]]), 0.6)
    short = rows.page_refs.numpy().copy()
    num_refs = int(rows.row_indptr[1])
    short[[num_refs - 1, 2 * num_refs - 1], 2] -= 3  # the last page before three more tokens
    choose(selector, rows, refs=short)

    def assert_right():
        _, refs = choose(selector, rows)
        wanted = oracle(rows, 0, 0.6, 32**-0.5) + oracle(rows, 1, 0.6, 32**-0.5)
        assert np.array_equal(refs, rows.page_refs.numpy()[wanted])

    assert_right()
    used = set(rows.page_refs[:, 0].tolist())
    spare = next(page for page in range(len(rows.k_cache)) if page not in used)
    rows.k_cache[spare] = torch.randn(16, 32)  # a copy on write: another page at a place
    rows.page_refs[4, 0] = spare
    assert_right()
    rows.k_cache[spare] = 3 * torch.randn(16, 32)
    selector.forget(7)
    assert_right()


def test_short_rows_and_several_queries_read_everything():
    rows = paged_rows([[(0, 30, 0)]], [[29]], page_size=16)
    selector = PageSelector(np.array([[True]]), 0.1)
    assert len(choose(selector, rows)[1]) == 2
    rows = paged_rows([[(0, 90, 0)]], [[88, 89]], page_size=16)
    indptr, refs = rows.row_indptr.numpy(), rows.page_refs.numpy()
    _, kept = select_pages(
        [selector], [7], [2], 0, rows.q, rows.k_cache, indptr, refs,
        softmax_scale=None, softcap=0.0, inv_freq=None,
    )  # fmt: skip
    assert np.array_equal(kept, refs)


# --- in the engine --------------------------------------------------------------------------------


def heads_of(kind: str, top_p: float = 0.9) -> HeadMap:
    classes = [["local", kind], [kind, kind], [kind, "local"]]
    return HeadMap(classes, window=24, retrieval_top_p=top_p)


def test_only_maps_with_retrieval_heads_select():
    assert PageSelector.of(heads_of("global")) is None
    assert PageSelector.of(heads_of("retrieval", 1.0)) is None
    heads = HeadMap([["retrieval"], ["retrieval"]], dense_prefix_layers=1)
    assert heads.is_retrieval.tolist() == [[False], [True]]
    selector = PageSelector.of(heads)
    assert [selector.heads(layer).tolist() for layer in range(2)] == [[], [0]]


@pytest.fixture(scope="module")
def generated():
    """Tokens and page share under each map, over the same documents."""
    rng = np.random.default_rng(3)
    documents = [random_tokens(rng, n) for n in (90, 120, 75)]
    question = random_tokens(rng, 6)
    model = tiny_model("qwen3", 4, 2)
    found = {}
    for name, heads in (
        ("global", heads_of("global")),
        ("everything", heads_of("retrieval", 1.0)),
        ("nearly everything", heads_of("retrieval", 1 - 1e-7)),
        ("some", heads_of("retrieval", 0.6)),
    ):
        engine = Engine(model, heads, prefix=[1], kv_budget="16MiB", page_size=16)
        ids = [engine.add(document) for document in documents]
        found[name] = engine.generate([ids, ids[:2]], [question, question], max_new_tokens=12)
    return found


def test_top_p_of_one_is_a_global_head(generated):
    for name in ("everything", "nearly everything"):
        tokens = [g.token_ids for g in generated[name]]
        assert tokens == [g.token_ids for g in generated["global"]], name
    assert [g.retrieval_page_share for g in generated["everything"]] == [None, None]
    assert all(g.retrieval_page_share == 1 for g in generated["nearly everything"])


def test_fewer_pages_are_read_and_all_are_kept(generated):
    for some, every in zip(generated["some"], generated["global"], strict=True):
        assert 0 < some.retrieval_page_share < 0.9
        assert some.kv_bytes == every.kv_bytes
        assert torch.equal(some.first_logits, every.first_logits)  # prefill reads everything
        assert len(some.token_ids) == 12
