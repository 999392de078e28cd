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
    return lambda: bench._Pool("tiny", (0, 2), 600, Options(quick=True, dtype="float32"))


def test_sessions_whose_pages_alone_are_taken_are_counted_like_computed_ones(pool):
    replayed, computed = pool().rows(32), pool().rows(32, computed=10_000)
    for number, (short, full) in enumerate(zip(replayed, computed, strict=True)):
        ours, whole = short.figures, full.figures
        assert (ours["computed"], whole["computed"]) == (int(number == 0), whole["sessions"])
        same = ("sessions", "sessions_monolithic", "ratio", "pages", "shared_documents")
        assert [ours[name] for name in same] == [whole[name] for name in same]
    few_rows = replayed.pop().figures
    by_sharing = {row.figures["shared_documents"]: row.figures for row in replayed}
    assert by_sharing["none"]["sessions_monolithic"] == 16
    assert 3 < by_sharing["none"]["ratio"] < by_sharing["none"]["ratio_formula"]
    assert by_sharing["any_order"]["ratio"] > by_sharing["none"]["ratio"]
    assert by_sharing["same_order"]["ratio"] > 2 * by_sharing["any_order"]["ratio"]
    assert (few_rows["policy"], few_rows["shared_documents"]) == ("epic", "any_order")
    assert few_rows["ratio"] > 3  # 1 if documents were copied whole


def test_a_whole_decode_step_counts_weights_and_pages(monkeypatch):
    from redknot.eval.bench import decode_step
    from redknot.eval.bench.roofs import Roofs
    from redknot.recovery import ModelShape

    shape = ModelShape(2, 4, 2, 16, 64, 96, 320)
    monkeypatch.setattr(Options, "shapes", lambda self, name: {"tiny": shape})
    monkeypatch.setattr(decode_step, "_WINDOW", 128)
    options = Options(quick=True, dtype="float32", batches=(2,))
    [row] = decode_step.step_rows(options, Roofs(1.0, 1.0, 1.0))
    details = row.details
    # One of two layers, so half of the vocabulary; every weight once, the tied embeddings too.
    attention, ffn, norms = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96, 3 * 64
    assert details["vocab_size"] == 160
    assert details["weight_bytes"] == 4 * (attention + ffn + norms + 160 * 64)
    lengths = details["lengths"]
    page = 2 * 64 * 16 * 4  # K and V, 64 slots, head_dim 16, float32
    whole = sum(-(-length // 64) for length in lengths)
    assert details["kv_bytes_monolithic"] == 2 * whole * page  # two KV heads
    kept = details["kv_bytes"] / page - whole  # sink page, window of 128, a page in part
    assert 2 * 3 <= kept <= 2 * 4
    assert row.time_ms > 0 and row.peers_ms["monolithic"] > 0
    bytes_ratio = (details["weight_bytes"] + details["kv_bytes_monolithic"]) / (
        details["weight_bytes"] + details["kv_bytes"]
    )
    assert details["bytes_ratio"] == pytest.approx(bytes_ratio)
    times_faster = row.peers_ms["monolithic"] / row.time_ms
    assert details["efficiency"] == pytest.approx(times_faster / bytes_ratio)


def test_rows_have_the_fields_that_are_asked_for(pool):
    assert bench_module("capacity") is bench
    row = json.loads(json.dumps(pool().rows(32)[0].to_dict()))
    assert {
        "model", "context", "window", "global_fraction", "shared_documents", "sessions",
        "sessions_monolithic", "ratio", "tokens_per_second", "kind",
    } <= row.keys()  # fmt: skip
    assert "figures" not in row
