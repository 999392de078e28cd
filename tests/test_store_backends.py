"""One contract for every storage engine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from store_case import needs_redis, redis_server  # noqa: F401

from redknot.errors import InputError, StoreDamagedError, StoreError
from redknot.store import ItemWrite, RangeRead, Status, open_backend, parse_size, parse_url

TIMEOUT = 5.0


@pytest.fixture(params=["mem", "lmdb", pytest.param("redis", marks=needs_redis)])
def backend(request, tmp_path):
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
    else:
        url = {"mem": "mem:", "lmdb": f"lmdb://{tmp_path}/store"}[request.param]
    opened = open_backend(parse_url(url))
    yield opened
    opened.close()


def read(backend, key, ranges, size):
    out = bytearray(sum(length for _, length in ranges))
    status = backend.get_ranges([RangeRead(key, ranges, size, memoryview(out))], TIMEOUT)[0]
    return status, bytes(out)


def test_what_is_put_is_got(backend):
    large = os.urandom(3 << 20)
    put = [ItemWrite("m/a", b"small"), ItemWrite("d/a/1/x", memoryview(large))]
    assert backend.put(put, TIMEOUT) == [Status.OK] * 2
    assert backend.get(["m/a", "m/b", "m/a"], TIMEOUT) == [b"small", Status.MISSING, b"small"]
    ranges = [(0, 10), (1000, 1), (2 << 20, 70000), (len(large) - 5, 5)]
    status, out = read(backend, "d/a/1/x", ranges, len(large))
    assert status is Status.OK
    assert out == b"".join(large[offset : offset + length] for offset, length in ranges)
    assert read(backend, "d/a/1/x", [(0, len(large))], len(large)) == (Status.OK, large)


def test_an_item_of_another_size_is_not_read(backend):
    backend.put([ItemWrite("d/a/1/x", b"12345")], TIMEOUT)
    for size in (4, 6):
        for ranges in ([(0, 2), (3, 1)], [(0, size)]):
            status, out = read(backend, "d/a/1/x", ranges, size)
            assert status is Status.SHORT and not any(out)
    assert read(backend, "d/a/1/y", [(0, 5)], 5)[0] is Status.MISSING
    assert read(backend, "d/a/1/y", [(0, 1), (3, 1)], 5)[0] is Status.MISSING


def test_items_are_replaced_listed_and_removed(backend):
    backend.put([ItemWrite(f"d/{i}/1/x", bytes(i)) for i in range(1, 5)], TIMEOUT)
    backend.put([ItemWrite("d/3/1/x", b"other!!")], TIMEOUT)
    assert backend.sizes("d/", TIMEOUT) == {"d/1/1/x": 1, "d/2/1/x": 2, "d/3/1/x": 7, "d/4/1/x": 4}
    assert backend.sizes("d/3/", TIMEOUT) == {"d/3/1/x": 7}
    assert backend.remove(["d/3/1/x", "d/9/1/x"], TIMEOUT) == [Status.OK, Status.MISSING]
    assert backend.get(["d/3/1/x"], TIMEOUT) == [Status.MISSING]
    assert backend.used_bytes(TIMEOUT) > 0


def test_lmdb_is_one_environment_for_a_process(tmp_path):
    url = parse_url(f"lmdb://{tmp_path}/store")
    first, second = open_backend(url), open_backend(url)
    first.put([ItemWrite("m/a", b"x")], TIMEOUT)
    first.close()
    assert second.get(["m/a"], TIMEOUT) == [b"x"]
    second.close()
    third = open_backend(url)
    assert third.get(["m/a"], TIMEOUT) == [b"x"]
    third.close()


def test_an_environment_of_something_else_is_refused(tmp_path):
    import lmdb

    with lmdb.open(str(tmp_path / "other")) as env, env.begin(write=True) as txn:
        txn.put(b"theirs", b"data")
    with pytest.raises(StoreError, match="something else") as error:
        open_backend(parse_url(f"lmdb://{tmp_path}/other"))
    assert not isinstance(error.value, StoreDamagedError)
    with lmdb.open(str(tmp_path / "newer")) as env, env.begin(write=True) as txn:
        txn.put(b"redknot-store", b"99")
    with pytest.raises(StoreError, match="format 99"):
        open_backend(parse_url(f"lmdb://{tmp_path}/newer"))


def test_a_store_that_is_not_there_is_not_made_by_a_look(tmp_path):
    with pytest.raises(StoreError, match="no store"):
        open_backend(parse_url(f"lmdb://{tmp_path}/none"), create=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("limit", ["map", "file"])
def test_a_full_disk_is_a_status_and_loses_nothing(tmp_path, limit):
    """The file may not grow: by LMDB's own limit, or by the system's (as on a full disk)."""
    code = f"""
import resource, sys
sys.path.insert(0, {os.path.abspath("python")!r})
from pathlib import Path
from redknot.store.lmdb_backend import LmdbBackend
from redknot.store.backend import ItemWrite, Status
limit = 4 << 20
if {limit == "file"}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
map_bytes = limit if {limit == "map"} else 1 << 30
backend = LmdbBackend(Path({str(tmp_path / "s")!r}), map_bytes=map_bytes)
kept = []
for i in range(40):
    [status] = backend.put([ItemWrite(f"d/{{i}}", bytes([i]) * 300_000)], 5.0)
    if status is Status.OK:
        kept.append(i)
    else:
        assert status is Status.FULL, status
assert 5 < len(kept) < 20, kept
for i in kept:
    assert backend.get([f"d/{{i}}"], 5.0) == [bytes([i]) * 300_000]
assert backend.remove([f"d/{{kept[0]}}", f"d/{{kept[1]}}"], 5.0) == [Status.OK] * 2
assert backend.put([ItemWrite("d/again", b"x" * 300_000)], 5.0) == [Status.OK]
backend.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket", "must be mem:, lmdb:///path or redis://"),
        ("file:///x", "export and import"),
        ("lmdb://relative", "three slashes"),
        ("lmdb:///", "three slashes"),
        ("mem:/x", "no path"),
        ("lmdb:///x?capacity=lots", "capacity must be bytes"),
        ("lmdb:///x?policy=random", "unknown policy 'random'; there are lru"),
        ("lmdb:///x?ttl=-1", "ttl must be a number of seconds above 0"),
        ("lmdb:///x?timeout=inf", "timeout must be"),
        ("lmdb:///x?size=3", "unknown option 'size'"),
        ("redis://h?capacity=1GiB", "maxmemory"),
        (7, "given by its URL"),
    ],
)
def test_bad_urls_say_what_is_wrong(url, message):
    with pytest.raises(InputError, match=message):
        parse_url(url)


def test_options_of_a_url():
    url = parse_url("lmdb:///a/b?capacity=2GiB&policy=cost&ttl=60&timeout=0.5")
    assert (url.capacity, url.policy, url.ttl, url.timeout) == (2 << 30, "cost", 60.0, 0.5)
    assert str(url.path) == "/a/b"
    assert parse_url("redis://h:1/2?timeout=3&protocol=2").target == "redis://h:1/2?protocol=2"
    assert parse_size("1.5 KB", "x") == 1500
