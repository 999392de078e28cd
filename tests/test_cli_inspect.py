"""`redknot inspect`: the figures are the ledger's and the head map's, bad input is one line."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from transformers import LlamaConfig, MistralConfig

from redknot.cli.main import main
from redknot.heads import HeadMap

LAYERS, HEADS, HEAD_DIM = 4, 2, 16
SHAPE = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "hidden_size": 64,
    "intermediate_size": 160,
    "vocab_size": 50,
}


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(dtype="bfloat16", **SHAPE).save_pretrained(tmp_path)
    classes = [["local"] * HEADS for _ in range(LAYERS)]
    classes[2][1] = "global"
    HeadMap(classes, window=32, sink=4).to_json(tmp_path / "map.json")
    return tmp_path


def inspect(folder, *options):
    arguments = ["inspect", "--head-map", str(folder / "map.json")]
    return main([*arguments, "--model-config", str(folder), *options])


def report_of(capsys, folder, *options):
    assert inspect(folder, "--json", *options) == 0
    return json.loads(capsys.readouterr().out)


def test_bytes_are_those_of_the_visibility_rule(capsys, folder):
    report = report_of(capsys, folder, "--context", "1024", "--page-size", "16")
    assert report["head_map"]["heads_per_class"]["global"] == 1
    assert [row["context"] for row in report["bytes"]] == [64, 256, 1024]
    row = report["bytes"][-1]
    page = 2 * 16 * HEAD_DIM * 2
    assert row["full_kv_bytes"] == LAYERS * HEADS * 64 * page
    # Sink: 1 page; positions 993..1023: 2 pages (992 starts one).
    assert row["head_map_kv_bytes"] == (64 + 7 * 3) * page
    assert row["session_ceiling"] == pytest.approx(8 * 64 / 85)


def test_flops_by_hand(capsys, folder):
    n, q = 300, 20
    options = ["--context", str(n), "--question-tokens", str(q)]
    flops = report_of(capsys, folder, *options)["prefill_flops"]
    hidden, ffn, q_heads = 64, 160, 4
    pairs_global = n * (n + 1) // 2
    pairs_local = sum(1 for i in range(n) for j in range(i + 1) if j < 4 or j > i - 32)
    kv_rows = [HEADS * q] * LAYERS
    kv_rows[2] = n + q
    rotated = [n * q_heads + rows for rows in kv_rows]
    parts = {
        "projections": 4 * hidden * HEAD_DIM * (LAYERS * n * q_heads + sum(kv_rows)),
        "rotation": 3 * HEAD_DIM * sum(rotated),
        "attention": 4 * HEAD_DIM * 2 * (pairs_global + 7 * pairs_local),
        "ffn": 6 * hidden * ffn * n * LAYERS,
        "lm_head": 2 * hidden * 50,
    }
    assert flops["parts"] == parts
    dense = (
        4 * hidden * HEAD_DIM * LAYERS * n * (q_heads + HEADS)
        + 3 * HEAD_DIM * LAYERS * n * (q_heads + HEADS)
        + 4 * HEAD_DIM * 2 * 8 * pairs_global
        + parts["ffn"]
        + parts["lm_head"]
    )
    assert flops["dense"] == dense
    assert flops["saved"] == pytest.approx(1 - sum(parts.values()) / dense)
    sparse = report_of(capsys, folder, *options, "--ffn-keep", "0.25", "--dense-until", "1")
    ffn_rows = n + 3 * (q + 70)
    assert sparse["prefill_flops"]["parts"]["ffn"] == 6 * hidden * ffn * ffn_rows
    assert sparse["prefill_flops"]["parts"]["selection"] == 3 * 2 * n * q_heads * HEAD_DIM


def test_all_global_saves_nothing_but_says_so(capsys, folder):
    HeadMap.all_global(LAYERS, HEADS).to_json(folder / "map.json")
    report = report_of(capsys, folder, "--context", "512")
    assert report["bytes"][-1]["session_ceiling"] == 1
    assert report["prefill_flops"]["saved"] == pytest.approx(0)


def test_a_native_sliding_window_is_no_saving(capsys, folder):
    MistralConfig(dtype="float32", sliding_window=16, **SHAPE).save_pretrained(folder)
    report = report_of(capsys, folder, "--context", "512", "--page-size", "1")
    row = report["bytes"][-1]
    assert report["model"]["bytes_per_element"] == 4
    assert row["full_kv_bytes"] == LAYERS * HEADS * 15 * 2 * HEAD_DIM * 4
    assert row["session_ceiling"] == 1  # the map's windows are wider than the model's own
    assert report["prefill_flops"]["parts"]["attention"] == 4 * HEAD_DIM * 4 * LAYERS * (
        np.minimum(np.arange(512) + 1, 16).sum()
    )


def test_text_shows_map_bytes_and_assumptions(capsys, folder):
    assert inspect(folder, "--context", "4096") == 0
    out = capsys.readouterr().out
    assert "4 layers x 2 KV heads: 1 global, 7 local" in out
    rows = [line.split() for line in out.splitlines()[4:7]]
    assert rows == [["0-1", ".."], ["2", ".G"], ["3", ".."]]
    assert "session ceiling" in out and "Assumed:" in out and "4,096" in out


def test_plot(capsys, folder, monkeypatch):
    pytest.importorskip("matplotlib")
    target = folder / "map.png"
    assert inspect(folder, "--context", "4096", "--plot", str(target)) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert inspect(folder, "--context", "4096", "--plot", str(folder / "map.txt")) == 2
    assert "must name a .png file" in capsys.readouterr().err
    assert inspect(folder, "--context", "4096", "--plot", str(folder / "no" / "map.png")) == 2
    assert "cannot write it" in capsys.readouterr().err
    original = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert inspect(folder, "--context", "4096", "--plot", str(target)) == 2
    assert "pip install 'redknot[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--context", "9"], "--question-tokens (64) must not exceed --context (9)"),
        (["--context", "99", "--ffn-keep", "0"], "--ffn-keep must be in (0, 1], got 0.0"),
        (["--context", "99", "--page-size", "0"], "--page-size must be at least 1, got 0"),
        (["--context", "99", "--dense-until", "-1"], "--dense-until must be at least 0, got -1"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(capsys, folder, options, message):
    assert inspect(folder, *options) == 2
    captured = capsys.readouterr()
    assert captured.err == f"redknot inspect: {message}\n" and captured.out == ""


def test_bad_files_are_one_line_and_exit_code_2(capsys, folder):
    def error():
        assert inspect(folder, "--context", "99") == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == ""
        return captured.err

    HeadMap.all_local(LAYERS + 1, HEADS).to_json(folder / "map.json")
    assert "is for 5 layers of 2 KV heads, but the model has 4 layers of 2" in error()
    (folder / "map.json").write_text("{}")
    assert "kv_head_classification is missing" in error()
    (folder / "map.json").unlink()
    assert "cannot read it" in error()
    HeadMap.all_local(LAYERS, HEADS).to_json(folder / "map.json")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type 'gpt2' is not supported" in error()
    (folder / "config.json").unlink()
    assert "no config.json in this folder" in error()
