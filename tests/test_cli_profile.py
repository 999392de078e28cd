"""`redknot profile` as a user runs it: a process of its own, files in, files out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from redknot import HeadMap
from redknot.cli.main import main
from redknot.eval.arrivals import make_prompt
from redknot.eval.demo import DEMO_MODEL

pytestmark = pytest.mark.transformers
PACKAGES = str(Path(__file__).parent.parent / "python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile")
    rows = []
    for seed in (100_000, 100_001):
        prompt = make_prompt(seed, 400, 8)
        rows += [
            {"documents": list(prompt.documents), "question": q.text, "answer": q.answer}
            for q in prompt.questions
        ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (path / "asked.jsonl").write_text(lines + "\n", encoding="utf-8")
    prompt = make_prompt(100_002, 600, 1)
    (path / "plain.txt").write_text("".join(prompt.documents), encoding="utf-8")
    return path


def redknot(*arguments):
    command = [sys.executable, "-m", "redknot.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def measured(folder):
    return redknot(
        "profile", DEMO_MODEL, "--text", folder / "asked.jsonl", "-o", folder / "heads.json",
        "--window", "32", "--dtype", "float32", "--threads", "1",
    )  # fmt: skip


def test_a_map_and_a_profile_are_written_and_the_figures_printed(folder, measured):
    assert measured.returncode == 0, measured.stderr
    assert measured.stderr == ""
    for words in ("2 samples of about", "highest heads", "whole maps", "points", "1.1 ",
                  "5 global, 43 local", "of the global heads in common", "wrote"):  # fmt: skip
        assert words in measured.stdout
    shipped = HeadMap.from_json(DEMO_MODEL / "head_map.json")
    found = HeadMap.from_json(folder / "heads.json")
    needed = shipped.is_global & (shipped.sensitivity > 0.05)  # the others need more questions
    assert found.is_global.tolist() == needed.tolist()
    assert {p.name for p in folder.glob("heads*")} == {"heads.json", "heads.profile.json"}


def test_other_maps_are_made_from_the_profile_without_the_model(folder, measured, capsys):
    out = folder / "few.json"
    source = ["profile", "--from", str(folder / "heads.profile.json"), "-o", str(out), "--json"]
    assert main([*source, "--global-fraction", "0.05"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["summary"]["heads_per_class"]["global"]
        == 2
        == HeadMap.from_json(out).is_global.sum()
    )
    assert report["criterion"] == {"global_fraction": 0.05}
    assert report["whole_maps"][-1]["kl"] == 0
    assert main([*source, "--kv-bytes", "1MiB", "--at", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["criterion"]["kv_bytes"] == 2**20
    assert main([*source, "--max-loss-points", "1", "--retrieval-share", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["heads_per_class"]["retrieval"] >= 1
    assert main([*source, "--kv-bytes", "1KiB"]) == 2
    assert "kv_bytes of 1,024 is too little" in capsys.readouterr().err


def test_the_map_serves_inspect_and_generate(folder, measured, capsys):
    heads = str(folder / "heads.json")
    assert main(["inspect", heads, "--context", "4096", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"][-1]["session_ceiling"] > 4
    arguments = ["--head-map", heads, "--question", "When does Yngve arrive ?", "--no-compare"]
    for city in ("izmir", "porto"):
        arguments += ["--doc", f"examples/documents/{city}.txt"]
    options = ["--max-new-tokens", "1", "--page-size", "16", "--kv-budget", "64MiB"]
    assert main(["generate", "--model", str(DEMO_MODEL), *arguments, *options]) == 0
    assert capsys.readouterr().out.startswith("00:00")


def test_plain_text_and_signals_alone(folder, capsys):
    out = folder / "plain.json"
    options = ["--context", "200", "--answer-tokens", "16", "--method", "signals"]
    text = ["--text", str(folder / "plain.txt")]
    assert main(["profile", str(DEMO_MODEL), *text, "-o", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "shift of the head's output" in printed and "whole maps" not in printed
    assert HeadMap.from_json(out).is_global.sum() == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL and at least one --text FILE are needed"),
        (["{model}"], "MODEL and at least one --text FILE are needed"),
        (["{model}", "--text", "missing.txt"], "missing.txt: cannot read the file"),
        (["{model}", "--text", "{folder}/empty.txt"], "empty.txt: the file is empty"),
        (["{model}", "--text", "{folder}/bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["{model}", "--text", "{folder}/lacks.jsonl"], "line 1: answer is missing"),
        (["{model}", "--text", "{folder}/plain.txt"], "too short to calibrate on"),
        (["{folder}", "--text", "{folder}/plain.txt"], "no config.json in this folder"),
        (["{model}", "--text", "a", "--window", "0"], "--window must be at least 1, got 0"),
        (["{model}", "--text", "a", "--coverage", "0"], "--coverage must be in (0, 1], got 0.0"),
        (["--from", "{folder}/plain.txt"], "plain.txt: not JSON"),
        (["{model}", "--from", "{folder}/plain.txt"], "--from measures nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    (folder / "empty.txt").write_text(" \n")
    good = '{"documents": ["a"], "question": "b", "answer": "c"}\n'
    (folder / "bad.jsonl").write_text(good + "{\n")
    (folder / "lacks.jsonl").write_text('{"documents": ["a"], "question": "b"}\n')
    filled = [a.format(model=DEMO_MODEL, folder=folder) for a in arguments]
    assert main(["profile", *filled, "-o", str(folder / "x.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("redknot profile: ") and message in captured.err
    assert not (folder / "x.json").exists()


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(capsys):
    arguments = ["profile", str(DEMO_MODEL), "--text", "a", "-o", "no/such/heads.json"]
    assert main(arguments) == 2
    assert "no/such/heads.json: cannot write it: No such file" in capsys.readouterr().err
