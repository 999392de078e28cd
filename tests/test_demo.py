"""The embedded model: what the head map claims holds on held-out questions."""

from __future__ import annotations

import json

import pytest

from redknot import Dense, HeadMap, LiveSpan, Naive, RedKnot
from redknot.cli.main import main
from redknot.eval.candidates import other_heads
from redknot.eval.demo import DEMO_MODEL, demo_engine, run_demo
from redknot.eval.statistics import median_and_spread, wilson_interval

pytestmark = pytest.mark.transformers
QUESTIONS = 144


@pytest.fixture(scope="module")
def heads():
    return HeadMap.from_json(DEMO_MODEL / "head_map.json")


@pytest.fixture(scope="module")
def figures(heads):
    """Every kind of policy; and redknot with as many other heads global in the same layers."""
    engine, wrong = demo_engine(heads), demo_engine(other_heads(heads))
    policies = [
        ("dense", Dense(), engine),
        ("naive", Naive(), engine),
        ("redknot", RedKnot(), engine),
        ("live_span", LiveSpan(), engine),
        ("wrong heads", RedKnot(), wrong),
    ]
    return run_demo(QUESTIONS, seed=500, policies=policies)[0]


def test_the_map_is_within_its_budget(heads, figures):
    assert heads.global_fraction <= 0.15
    local = ~heads.is_global
    assert (heads.windows[local] + heads.sinks[local]).max() <= figures["prompt_tokens"] / 8
    assert not (other_heads(heads).is_global & heads.is_global).any()


def test_redknot_answers_as_dense_and_naive_does_not(figures):
    scores = {name: score["exact_match"] for name, score in figures["policies"].items()}
    assert figures["n"] >= QUESTIONS
    assert scores["dense"] >= 0.95
    assert scores["redknot"] >= scores["dense"] - 0.01
    assert scores["live_span"] >= scores["dense"] - 0.01
    assert scores["naive"] <= scores["dense"] - 0.20
    assert scores["wrong heads"] <= scores["dense"] - 0.20


def test_direct_facts_survive_naive_reuse(figures):
    naive = figures["policies"]["naive"]["exact_match_by_kind"]
    assert naive["direct"] >= 0.95 and naive["relative"] <= 0.30


def test_savings_are_real(figures):
    dense, redknot = figures["policies"]["dense"], figures["policies"]["redknot"]
    assert figures["policies"]["live_span"]["flops_saved"] >= 0.9
    assert dense["flops_saved"] == 0 and dense["token_agreement"] == 1
    assert redknot["flops_saved"] > 0.4
    assert redknot["kv_bytes"] < 0.5 * dense["kv_bytes"]


def test_json_of_the_command(capsys):
    assert main(["demo", "--questions", "3", "--context", "200", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["n"] == 3
    keys = {"exact_match", "token_agreement", "flops_saved", "kv_bytes", "ttft_ratio",
            "global_fraction"}  # fmt: skip
    assert list(figures["policies"]) == ["dense", "naive", "redknot"]
    assert all(keys <= set(score) for score in figures["policies"].values())


def test_the_text_of_the_command(capsys):
    assert main(["demo", "--questions", "4", "--context", "200"]) == 0
    out = capsys.readouterr().out
    for words in ("exact match", "One question in full", "explain()", "policy redknot"):
        assert words in out


def test_intervals():
    low, high = wilson_interval(90, 100)
    assert 0.82 < low < 0.9 < high < 0.95
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0])[0] == 3.0
