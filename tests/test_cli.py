"""The command line on a checkpoint and text files; every error is one line and exit code 2."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from redknot import HeadMap
from redknot.cli.main import main
from redknot.eval.demo import DEMO_MODEL

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def model_dir():
    return DEMO_MODEL


@pytest.fixture
def documents(tmp_path):
    texts = [
        "Note from Izmir :\nUlla lands 21:00 .\n",
        "Memo from Porto :\nYngve trails Ulla +3h .\n",
    ]
    paths = []
    for number, text in enumerate(texts):
        path = tmp_path / f"doc{number}.txt"
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


def command(model_dir, documents, *more):
    args = ["generate", "--model", str(model_dir), "--question", "When does Yngve arrive ?"]
    for path in documents:
        args += ["--doc", path]
    return [*args, "--kv-budget", "16MiB", "--page-size", "16", *more]


def test_generate_prints_an_answer_and_what_it_cost(model_dir, documents, capsys):
    head_map = str(model_dir / "head_map.json")
    assert main(command(model_dir, documents, "--head-map", head_map, "--max-new-tokens", "3")) == 0
    out = capsys.readouterr().out
    assert out.startswith("00:00")
    for word in ("TTFT", "dense (Hugging Face)", "FLOPs", "paid back", "KV held", *documents):
        assert word in out


def test_generate_json(model_dir, documents, capsys):
    args = command(model_dir, documents, "--json", "--repeats", "2", "--max-new-tokens", "3")
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"].split()[0] == "00:00"
    assert [run["name"] for run in report["runs"]] == ["redknot", "dense", "dense (Hugging Face)"]
    assert all(run["ttft_seconds"] > 0 and run["peak_bytes"] > 0 for run in report["runs"])
    assert [d["name"] for d in report["explain"]["documents"]] == documents
    assert report["ledger"]["dense_flops"] > report["ledger"]["flops"] > 0


def test_generate_uses_a_store(model_dir, documents, tmp_path, capsys):
    url = f"lmdb://{tmp_path}/store?prefer=load"

    def run(*more):
        args = command(model_dir, documents, "--store", url, "--no-compare", "--repeats", "1",
                       "--max-new-tokens", "3", *more)  # fmt: skip
        assert main(args) == 0
        return capsys.readouterr()

    first = json.loads(run("--json").out)
    assert [d["reason"].split(";")[1] for d in first["explain"]["documents"]] == [
        " lmdb: not stored)"
    ] * len(documents)
    [tier] = first["store"]
    stored = len(documents) + 1  # and the prefix
    assert (tier["hits"], tier["misses"], tier["segments_written"]) == (0, stored, stored)

    second = json.loads(run("--json").out)
    assert second["token_ids"] == first["token_ids"]
    assert all("(loaded from lmdb: " in d["reason"] for d in second["explain"]["documents"])
    [tier] = second["store"]
    assert (tier["hits"], tier["misses"], tier["segments_written"]) == (stored, 0, 0)
    assert tier["bytes_read"] > 0 and second["first_ttft_seconds"] > 0
    text = run().out
    assert f"store lmdb: {stored} hits" in text and "first request: TTFT" in text

    import lmdb

    with lmdb.open(str(tmp_path / "store")) as env, env.begin(write=True) as txn:
        beginning = b"m/" + first["explain"]["documents"][0]["id"].encode()
        [manifest] = [key for key, _ in txn.cursor() if key.startswith(beginning)]
        txn.put(manifest, b"damaged")
    report = json.loads(run("--json").out)
    assert report["token_ids"] == first["token_ids"]
    assert report["store"][0]["failures"] == {"damaged": 1}
    reasons = [d["reason"] for d in report["explain"]["documents"]]
    assert ["lmdb: damaged" in reason for reason in reasons] == [True, False]


def test_generate_refuses_a_bad_store(model_dir, documents, capsys):
    assert main(command(model_dir, documents, "--store", "s3://bucket")) == 2
    error = capsys.readouterr().err
    assert "s3://bucket" in error and error.count("\n") == 1


@pytest.mark.parametrize("policy", ["dense", "naive"])
def test_policies(model_dir, documents, policy, capsys):
    args = command(model_dir, documents, "--json", "--policy", policy, "--no-compare",
                   "--max-new-tokens", "2")  # fmt: skip
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["explain"]["policy"] == policy
    assert (report["dense_kv_bytes"] is None) == (policy != "dense")  # nothing that was not run
    assert len(report["runs"]) == 1


def fails(capsys, args, *words):
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"redknot {args[0]}: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


def test_missing_and_unreadable_documents(model_dir, tmp_path, capsys):
    fails(capsys, command(model_dir, ["/nowhere.txt"]), "/nowhere.txt", "No such file")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    fails(capsys, command(model_dir, [str(latin)]), "latin.txt", "not UTF-8")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    fails(capsys, command(model_dir, [str(empty)]), "empty.txt", "empty")


def test_bad_head_maps(model_dir, documents, tmp_path, capsys):
    path = tmp_path / "map.json"
    HeadMap.all_global(2, 2).to_json(path)
    fails(capsys, command(model_dir, documents, "--head-map", str(path)), "2")
    data = json.loads((model_dir / "head_map.json").read_text())
    data["kv_head_classification"][1][2] = "galactic"
    path.write_text(json.dumps(data))
    fails(capsys, command(model_dir, documents, "--head-map", str(path)), "layer 1", "galactic")
    path.write_text("{")
    fails(capsys, command(model_dir, documents, "--head-map", str(path)), "map.json")
    data = json.loads((model_dir / "head_map.json").read_text())
    path.write_text(json.dumps({**data, "model_fingerprint": "0" * 64}))
    fails(capsys, command(model_dir, documents, "--head-map", str(path)), "another model")


def broken_copy(model_dir, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_dir, copy)
    return copy


def test_a_model_without_weights(model_dir, documents, tmp_path, capsys):
    copy = broken_copy(model_dir, tmp_path)
    (copy / "model.safetensors").unlink()
    fails(capsys, command(copy, documents), "cannot load the weights")


def test_a_model_that_lacks_a_weight(model_dir, documents, tmp_path, capsys):
    copy = broken_copy(model_dir, tmp_path)
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    fails(capsys, command(copy, documents), "lacks weights", "model.layers.1.mlp.up_proj.weight")


def test_a_corrupt_model(model_dir, documents, tmp_path, capsys):
    copy = broken_copy(model_dir, tmp_path)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails(capsys, command(copy, documents), "cannot load the weights")


def test_a_weight_of_another_shape(model_dir, documents, tmp_path, capsys):
    copy = broken_copy(model_dir, tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    fails(capsys, command(copy, documents), "model.norm.weight")


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--kv-budget", "4KiB"], ["raise kv_budget"]),
     (["--kv-budget", "300KiB"], ["raise kv_budget to at least"]),
     (["--max-new-tokens", "100000"], ["context of"]),
     (["--repeats", "0"], ["--repeats"]),
     (["--policy", "naive", "--boundary-rows", "3"], ["--boundary-rows"]),
     (["--ffn-mass", "0"], ["ffn_mass"]),
     (["--page-size", "0"], ["page_size"]),
     (["--device", "abacus"], ["device 'abacus' cannot be used"])],
)  # fmt: skip
def test_bad_options(model_dir, documents, more, words, capsys):
    fails(capsys, command(model_dir, documents, *more), *words)


def test_no_model(documents, tmp_path, capsys):
    fails(capsys, command(tmp_path, documents), "no config.json")
    fails(capsys, command(tmp_path / "none", documents), "there is no such folder")
    fails(capsys, ["demo", "--questions", "0"], "--questions")
