"""`redknot bench capacity`: its counts are those of sessions that were really recovered."""

from __future__ import annotations

import json

import pytest

from redknot.eval.bench import bench_module
from redknot.eval.bench import capacity as bench
from redknot.eval.bench.options import Options

pytestmark = pytest.mark.transformers


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(bench, "_PAGE_SIZE", 8)
    monkeypatch.setattr(bench, "_ANSWER_TOKENS", 40)
    monkeypatch.setattr(bench, "_QUESTION_TOKENS", 5)
    return lambda: bench._Pool("tiny", (0, 2), 600, 32, Options(quick=True, dtype="float32"))


def test_sessions_whose_pages_alone_are_taken_are_counted_like_computed_ones(pool):
    replayed, computed = pool().rows(), pool().rows(computed=10_000)
    for short, full in zip(replayed, computed, strict=True):
        ours, whole = short.figures, full.figures
        assert (ours["computed"], whole["computed"]) == (1, whole["sessions"])
        same = ("sessions", "sessions_monolithic", "ratio", "pages", "shared_documents")
        assert [ours[name] for name in same] == [whole[name] for name in same]
    by_sharing = {row.figures["shared_documents"]: row.figures for row in replayed}
    assert by_sharing["none"]["sessions_monolithic"] >= 16
    assert 3 < by_sharing["none"]["ratio"] < by_sharing["none"]["ratio_formula"]
    assert by_sharing["any_order"]["ratio"] > by_sharing["none"]["ratio"]
    assert by_sharing["same_order"]["ratio"] > 2 * by_sharing["any_order"]["ratio"]


def test_rows_have_the_fields_that_are_asked_for(pool):
    assert bench_module("capacity") is bench
    row = json.loads(json.dumps(pool().rows()[0].to_dict()))
    assert {
        "model", "context", "window", "global_fraction", "shared_documents", "sessions",
        "sessions_monolithic", "ratio", "tokens_per_second", "kind",
    } <= row.keys()  # fmt: skip
    assert "figures" not in row
