"""`redknot store` and `redknot doctor`, metrics, and the policy simulator."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from store_case import expected_of, key_of, make_segment, needs_redis, redis_server  # noqa: F401

from redknot.cli.main import main
from redknot.eval.store_policies import TRACES, Trace, compare_policies, replay
from redknot.store import Loaded, TieredStore, open_tiers
from redknot.store.eviction import POLICIES
from redknot.store.metrics import StoreMetrics


@pytest.fixture(params=["lmdb", pytest.param("redis", marks=needs_redis)])
def url(request, tmp_path):
    """A store of three segments, the last with hidden states."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
    else:
        url = f"lmdb://{tmp_path}/store"
    store = TieredStore(open_tiers(url))
    for number in range(3):
        store.save(*make_segment(number, hidden_bytes=32 * (number == 2))[:2])
    store.close()
    return url


def run(capsys, *arguments, code=0):
    assert main(["store", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_segments_are_listed_shown_and_counted(url, capsys):
    listed = run(capsys, "ls", url)
    assert {s["key"] for s in listed["segments"]} == {key_of(n) for n in range(3)}
    shown = run(capsys, "get", url, key_of(2)[:10])
    assert shown["tokens"] == 100 and shown["hidden_layer"] == 1
    assert set(shown["objects"]) == {"global-0", "sink-0", "window-0", "middle-0"}
    stats = run(capsys, "stats", url)
    assert stats["segments"] == 3 and stats["segments_by_model"] == {"model-a": 3}
    assert stats["bytes"] == sum(s["bytes"] for s in listed["segments"])
    for action in (["ls"], ["stats"], ["verify"]):
        assert main(["store", *action, url]) == 0
        assert capsys.readouterr().out.count("\n") >= 1


def test_a_damaged_segment_is_found_and_removed_only_when_told(url, capsys):
    assert run(capsys, "verify", url) == {"right": 3, "troubles": []}
    [tier] = open_tiers(url)
    manifest = tier.manifest(key_of(1))
    [data] = tier.backend.get([manifest.object_keys[0]], 5.0)
    changed = bytearray(data)
    changed[100] ^= 1
    from redknot.store import ItemWrite

    tier.backend.put([ItemWrite(manifest.object_keys[0], bytes(changed)),
                      ItemWrite("d/abc/1/middle-0", b"left over")], 5.0)  # fmt: skip
    tier.close()
    for repair, expected in (([], 2), (["--repair"], 2)):
        found = run(capsys, "verify", url, *repair, code=1)
        assert found["right"] == 2 and len(found["troubles"]) == expected
    assert run(capsys, "verify", url) == {"right": 2, "troubles": []}


def test_segments_are_removed(url, capsys):
    assert run(capsys, "rm", url, key_of(0)[:8])["removed"] == [key_of(0)]
    assert len(run(capsys, "rm", url, "--model", "other")["removed"]) == 0
    assert len(run(capsys, "rm", url, "--all")["removed"]) == 2
    assert run(capsys, "stats", url)["bytes"] == 0


def test_exported_segments_are_tensors_and_come_back(url, capsys, tmp_path):
    folder = tmp_path / "out"
    assert len(run(capsys, "export", url, f"file://{folder}")["files"]) == 3
    manifest, _, pages = make_segment(2, hidden_bytes=32)
    with safe_open(folder / f"{key_of(2)}.safetensors", "pt") as file:
        k, v, hidden = (file.get_tensor(name) for name in ("k", "v", "hidden"))
    assert k.shape == v.shape == (3, 4, 100, 32) and k.dtype == torch.bfloat16
    assert hidden.shape == (100, 16)
    k_row, v_row, token = manifest.layout.rows(manifest.layout.selection(None))
    rows = torch.from_numpy(pages).view(torch.bfloat16).view(-1, 32)
    for tensor, row in ((k, k_row), (v, v_row)):
        stored = tensor.reshape(-1, 32)[torch.from_numpy(token)]
        assert torch.equal(stored.view(torch.int16), rows[torch.from_numpy(row)].view(torch.int16))
    other = f"lmdb://{tmp_path}/other"
    assert len(run(capsys, "import", other, str(folder))["segments"]) == 3
    assert run(capsys, "verify", other)["right"] == 3
    store = TieredStore(open_tiers(other))
    loaded = store.load(key_of(2), expected_of(manifest), hidden=True)
    assert isinstance(loaded, Loaded) and loaded.buffer.tobytes() == pages.tobytes()
    assert loaded.hidden.tobytes() == hidden.view(torch.uint8).numpy().tobytes()
    store.close()


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign"])
def test_damaged_files_are_not_imported(tmp_path, capsys, damage):
    url = f"lmdb://{tmp_path}/store"
    store = TieredStore(open_tiers(url))
    store.save(*make_segment(0)[:2])
    store.close()
    folder = tmp_path / "out"
    run(capsys, "export", url, str(folder))
    [path] = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-100] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"k": torch.zeros(2)}, path)
    assert main(["store", "import", f"lmdb://{tmp_path}/new", str(folder)]) == 2
    said = capsys.readouterr().err
    assert path.name in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "lmdb:///nowhere/at/all"], "no store"),
        (["ls", "mem:?capacity=1GiB"], "nothing to look at"),
        (["rm", "URL"], "takes keys, --model or --all"),
        (["get", "URL", "zz"], "no segment"),
        (["import", "URL", "/nowhere"], "no .safetensors"),
        (["export", "URL", "s3://x"], "write a path"),
        (["simulate", "--requests", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    url = f"lmdb://{tmp_path}/store"
    TieredStore(open_tiers(url)).close()
    assert main(["store", *(url if a == "URL" else a for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_doctor_says_what_works_and_what_to_do(tmp_path, capsys):
    url = f"lmdb://{tmp_path}/store"
    TieredStore(open_tiers(url)).close()
    assert main(["doctor", "--store", url, "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["ops"]["state"] == found["allocator"]["state"] == found["lmdb"]["state"] == "ok"
    assert main(["doctor", "--store", "redis://127.0.0.1:1/0?timeout=0.5"]) == 1
    said = capsys.readouterr().out
    assert "unreachable" in said and "-> engines work without it" in said


def test_metrics_are_what_was_counted():
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    store = TieredStore(open_tiers("mem:?capacity=1MiB"))
    StoreMetrics(store, registry)
    manifest, objects, _ = make_segment(0)
    store.load(manifest.key, expected_of(manifest))
    store.save(manifest, objects)
    store.flush()
    store.load(manifest.key, expected_of(manifest))

    def value(name, **labels):
        return registry.get_sample_value(name, {"tier": "0-mem", **labels})

    assert value("redknot_tier_lookups_total", outcome="hit") == 1
    assert value("redknot_tier_lookups_total", outcome="miss") == 1
    assert value("redknot_tier_read_bytes_total") == manifest.num_bytes
    assert value("redknot_tier_used_bytes") == manifest.num_bytes
    assert "redknot_tier_down" in client.generate_latest(registry).decode()


# --- the simulator -------------------------------------------------------------------------------


def naive_lru(trace: Trace, capacity: int) -> tuple[int, int]:
    """Bytes hit and needed by whole documents, by a list that is searched."""
    kept: list[int] = []
    hit = needed = 0
    size = [int(tokens) << 17 for tokens in trace.tokens]
    for request in trace.requests:
        for document, _ in request:
            needed += size[document]
            if document in kept:
                hit += size[document]
                kept.remove(document)
            elif size[document] > capacity:
                continue
            kept.append(document)
            while sum(size[d] for d in kept) > capacity:
                kept.pop(0)
    return hit, needed


def test_lru_is_what_a_list_says():
    trace = TRACES["rag"](60, 3)
    hit, needed = naive_lru(trace, int(trace.total_bytes * 0.05))
    outcome = replay(trace, "lru", 0.05, "segment")
    assert outcome.byte_hit_rate == pytest.approx(hit / needed) and hit


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_never_hold_more_than_fits_and_hold_what_is_popular(policy):
    everything = replay(TRACES["zipf"](400, 0), policy, 1.0)
    nothing = replay(TRACES["zipf"](400, 0), policy, 0.0)
    assert nothing.byte_hit_rate == 0.0 < everything.byte_hit_rate
    popular = Trace("x", np.full(50, 100), [[(0, True), (1 + i % 49, True)] for i in range(500)])
    assert replay(popular, policy, 0.2, "segment").byte_hit_rate > 0.4


def test_every_policy_meets_every_trace():
    rows = compare_policies(30)
    assert len(rows) == len(TRACES) * 2 * 2 * len(POLICIES)
    assert all(0 <= row["byte_hit_rate"] <= 1 for row in rows)
