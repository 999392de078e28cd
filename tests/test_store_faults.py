"""Faults of the medium: whatever happens to it costs misses, never a wrong byte or a hang."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from store_case import expected_of, make_segment, needs_redis, redis_server  # noqa: F401

from redknot.store import Loaded, Missed, TieredStore, open_tiers

TESTS = Path(__file__).parent
SIZE = {"layers": 2, "heads": 2, "tokens": 64}


def python(*arguments: str) -> str:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python")])
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def filled(url: str, count: int) -> TieredStore:
    store = TieredStore(open_tiers(url))
    for number in range(count):
        store.save(*make_segment(number, **SIZE)[:2])
    assert store.flush(20)
    return store


def outcomes(store: TieredStore, count: int) -> list[bool]:
    """Which segments were found; every one of them with the right bytes."""
    found = []
    for number in range(count):
        manifest, _, pages = make_segment(number, **SIZE)
        loaded = store.load(manifest.key, expected_of(manifest))
        if isinstance(loaded, Loaded):
            assert loaded.buffer.tobytes() == pages.tobytes()
        found.append(isinstance(loaded, Loaded))
    return found


def test_killed_writers_lose_nothing_that_was_committed(tmp_path):
    with contextlib.ExitStack() as stack:
        folder = tmp_path
        if os.path.isdir("/dev/shm"):  # no disk to wait for: more kills in the midst of a write
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        out = python(str(TESTS / "store_killer.py"), f"{folder}/store", "204", "1")
    kills, while_writing, committed, present = map(int, out.split())
    assert kills == 204 and while_writing > 100
    # What a writer could not report any more may be there besides.
    assert committed > 100 and committed <= present <= committed + kills


def damage(data: bytearray, rng: random.Random, kind: str) -> bytearray:
    if kind == "truncated":
        return data[: rng.randrange(len(data))]
    if kind == "bits":
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == "head":  # LMDB's own pages lie at the front and the end of this file
        data[rng.randrange(3 * 4096)] ^= 1 << rng.randrange(8)
    if kind == "zeros":
        at = rng.randrange(0, len(data), 4096)
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    return data


@pytest.mark.parametrize("kind", ["truncated", "bits", "head", "zeros"])
def test_damaged_files_cost_misses_and_no_process(tmp_path, kind, caplog):
    filled(f"lmdb://{tmp_path}/whole", 12).close()
    whole = (tmp_path / "whole" / "data.mdb").read_bytes()
    rng = random.Random(kind)
    for case in range(10):
        folder = tmp_path / f"{case}"
        folder.mkdir()
        (folder / "data.mdb").write_bytes(damage(bytearray(whole), rng, kind))
        caplog.clear()
        child = os.fork()
        if not child:  # as a crash would be this process's otherwise
            code = 1
            with contextlib.suppress(BaseException):
                store = TieredStore(open_tiers(f"lmdb://{folder}"))
                found = outcomes(store, 12)
                [tier] = store.tiers
                assert tier.counts.misses == found.count(False)
                assert tier.counts.hits == found.count(True)
                # One line for each miss; a store that is refused has one of its own besides.
                assert len(caplog.records) in (found.count(False), found.count(False) + 1)
                code = 0
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"{kind} {case}: {signal.Signals(status & 127).name if status else ''}"
        shutil.rmtree(folder)


CUT_OFF = """
import logging, os, sys
from test_store_faults import SIZE, filled, make_segment, outcomes
store = filled("lmdb://" + sys.argv[1], 12)
assert outcomes(store, 12) == [True] * 12
[tier] = store.tiers
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("redknot").addHandler(handler)
os.truncate(sys.argv[1] + "/data.mdb", int(float(sys.argv[2]) * tier.backend.used_bytes(5.0)))
assert outcomes(store, 12) == [False] * 12
assert (tier.counts.hits, tier.counts.misses, tier.counts.failures) == (12, 12, {"damaged": 12})
assert len(lines) == 12 and all("damaged; counted as a miss" in line for line in lines)
store.save(*make_segment(50, **SIZE)[:2])  # refused, not written into what is left
assert store.flush(20) and "could not be written: damaged" in lines[-1]
assert not isinstance(tier.backend.sizes("", 5.0), dict)
store.close()
"""


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
def test_a_file_that_is_cut_off_while_it_is_open_costs_misses(tmp_path, share):
    python("-c", CUT_OFF, str(tmp_path / "store"), str(share))


SHORT = """
import os, random, sys
import lmdb
rng, keys = random.Random(0), []
with lmdb.open(sys.argv[1], map_size=1 << 30) as env:
    while os.stat(sys.argv[1] + "/data.mdb").st_size >= (env.info()["last_pgno"] + 1) * 4096:
        with env.begin(write=True) as txn:
            for _ in range(rng.randrange(1, 200)):
                if keys and rng.random() < 0.55:
                    txn.delete(keys.pop(rng.randrange(len(keys))))
                else:
                    keys.append(b"x/%d" % rng.randrange(10**9))
                    txn.put(keys[-1], bytes(rng.choice([10, 500, 1500, 9000])))
"""


def test_a_file_whose_last_pages_were_never_written_is_whole(tmp_path):
    """LMDB leaves out pages that a transaction took and gave back."""
    url = f"lmdb://{tmp_path}/store"
    filled(url, 4).close()
    python("-c", SHORT, str(tmp_path / "store"))
    store = TieredStore(open_tiers(url))
    assert outcomes(store, 4) == [True] * 4
    [tier] = store.tiers
    assert (tmp_path / "store" / "data.mdb").stat().st_size >= tier.backend.used_bytes(5.0)
    store.close()


def test_two_processes_share_a_store(tmp_path):
    url = f"lmdb://{tmp_path}/store"
    mine = filled(url, 3)
    code = f"""
from test_store_faults import *
store = filled({url!r}, 6)  # the first three are there already
assert outcomes(store, 6) == [True] * 6
[tier] = store.tiers
assert tier.counts.segments_written == 3, tier.counts
"""
    python("-c", code)
    assert outcomes(mine, 7) == [True] * 6 + [False]
    mine.close()


class Proxy:
    """Stands between a client and a server, and spoils what the server says when told to."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.spoil = None
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._pump, args=(source, sink, answers), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self.spoil is not None:
                    data = self.spoil(data)
                    if data is None:
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def middle_bit(data: bytes) -> bytes:
    changed = bytearray(data)
    if len(changed) > 2000:  # a payload; manifests are smaller
        changed[len(changed) // 2] ^= 16
    return bytes(changed)


SPOILERS = {
    "garbage": lambda data: random.Random(len(data)).randbytes(len(data)),
    "a flipped bit": middle_bit,
    "cut off": lambda data: data[: len(data) // 2] if len(data) < 2000 else None,
    "an endless length": lambda data: b"$999999999999\r\n" + data,
    "another answer": lambda data: b"+OK\r\n",
    "an error": lambda data: b"-ERR broken\r\n",
    "a nil": lambda data: b"$-1\r\n",
    "nothing": lambda data: None,
}


@needs_redis
@pytest.mark.parametrize("how", SPOILERS)
def test_a_server_that_answers_nonsense_costs_misses(redis_server, how, caplog):  # noqa: F811
    proxy = Proxy(redis_server.port)
    store = filled(f"redis://127.0.0.1:{proxy.port}/0?timeout=0.3", 3)
    [tier] = store.tiers
    proxy.spoil = SPOILERS[how]
    begin = time.monotonic()
    assert outcomes(store, 3) == [False] * 3
    assert time.monotonic() - begin < 4.0
    missed = tier.counts.misses + tier.counts.skipped_down
    assert missed == 3 and tier.counts.hits == 0
    faults = sum(tier.counts.failures.values())
    assert how == "a nil" or 1 <= faults == len(caplog.records)
    proxy.spoil = None
    tier._down_until = 0.0
    # What was found damaged was removed; the rest is there and right, on a clean connection.
    assert outcomes(store, 3).count(True) >= (0 if how == "a flipped bit" else 1)
    store.save(*make_segment(9, **SIZE)[:2])
    assert store.flush(5) and outcomes(store, 10)[9]


@needs_redis
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_server_that_dies_or_hangs_costs_one_timeout(redis_server, how, caplog):  # noqa: F811
    store = filled(f"{redis_server.url}?timeout=0.4", 3)
    [tier] = store.tiers
    redis_server.kill() if how == "dies" else redis_server.hang()
    begin = time.monotonic()
    assert outcomes(store, 3) == [False] * 3
    assert time.monotonic() - begin < 1.0
    assert len(caplog.records) == 1 and tier.counts.skipped_down == 2
    missed = store.load(*_of(0))
    assert isinstance(missed, Missed) and missed.reason.startswith("redis: ")
    store.save(*make_segment(5, **SIZE)[:2])
    assert store.flush(5)
    redis_server.start() if how == "dies" else redis_server.go_on()
    tier._down_until = 0.0
    assert outcomes(store, 3) == ([False] * 3 if how == "dies" else [True] * 3)
    store.save(*make_segment(4, **SIZE)[:2])
    assert store.flush(5) and isinstance(store.load(*_of(4)), Loaded)


def _of(number):
    manifest = make_segment(number, **SIZE)[0]
    return manifest.key, expected_of(manifest)


@needs_redis
def test_a_server_that_dies_while_it_is_read_costs_misses(redis_server):  # noqa: F811
    store = filled(f"{redis_server.url}?timeout=0.5", 40)
    killer = threading.Timer(0.02, redis_server.kill)
    killer.start()
    begin = time.monotonic()
    found = outcomes(store, 40)
    assert time.monotonic() - begin < 3.0
    killer.join()
    assert not found[-1] or not outcomes(store, 1)[0]


@pytest.mark.parametrize("options", ["", "?capacity=64MiB"])
def test_a_full_disk_costs_writes_and_no_segment(tmp_path, options):
    """The process may not write more than 1 MiB to a file, as on a disk of that size."""
    code = f"""
import resource
from test_store_faults import *
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = filled("lmdb://{tmp_path}/store{options}", 30)
[tier] = store.tiers
found = outcomes(store, 30)
assert 5 < found.count(True) < 30, found
assert found[-1], "room is made for what is new"
assert tier.counts.evictions > 0, tier.counts
store.close()
store = TieredStore(open_tiers("lmdb://{tmp_path}/store"))
assert outcomes(store, 30) == found
"""
    python("-c", code)


def test_logging_is_left_to_the_application():
    assert not logging.getLogger("redknot").handlers
