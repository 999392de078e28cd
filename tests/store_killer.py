"""Writers that are killed: run by test_store_faults.py in a process without torch and threads.

    store_killer.py FOLDER KILLS SEED

Forks pairs of writers on one store, kills each at a random moment, and checks after every few that
whatever a writer said was committed is there, and that nothing is there by half. Prints a summary.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from store_case import expected_of, make_segment

from redknot.store import Loaded, Status, Tier, TieredStore, parse_url, tier
from redknot.store.lmdb_backend import LmdbBackend
from redknot.store.manifest import Manifest

SHAPE = {"layers": 2, "heads": 2, "tokens": 64}
PER_ROUND = 1000


def open_tier(folder: str, check: bool) -> Tier:
    url = parse_url(f"lmdb://{folder}")
    return Tier(LmdbBackend(Path(folder), check=check), url)


def write_until_killed(folder: str, first: int, pipe: int, batch_bytes: int) -> None:
    tier._BATCH_BYTES = batch_bytes  # one transaction for each segment, or many
    store = open_tier(folder, check=False)
    os.write(pipe, b"open")
    for number in range(first, first + PER_ROUND):
        manifest, objects, _ = make_segment(number, **SHAPE)
        if store.write(manifest, objects) is Status.OK:
            os.write(pipe, struct.pack("<i", number))
    os._exit(1)  # fast enough to finish: the test's numbers are wrong


def check(folder: str, committed: list[int], walk: bool) -> int:
    """Number of segments found; dies with an assertion where one is lost or wrong."""
    now = open_tier(folder, check=walk)
    store = TieredStore([now])
    names = [name for name in now.backend.sizes("m/", 5.0)]
    present = set()
    for name in names:
        manifest = now.manifest(name.removeprefix("m/"))
        assert isinstance(manifest, Manifest), name
        number = int(manifest.write_id, 16)
        loaded = store.load(manifest.key, expected_of(manifest))
        assert isinstance(loaded, Loaded), (number, loaded)
        assert loaded.buffer.tobytes() == make_segment(number, **SHAPE)[2].tobytes(), number
        present.add(number)
    lost = set(committed) - present
    assert not lost, f"lost: {sorted(lost)}"
    store.close()
    return len(present)


def main() -> None:
    folder, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    committed: list[int] = []
    killed_while_writing = 0
    open_tier(folder, check=False).close()
    make_segment(0, **SHAPE)  # whatever is imported late is imported now
    for pair in range(kills // 2):
        writers = []
        for half in range(2):
            receive, send = os.pipe()
            first = (2 * pair + half) * PER_ROUND
            batch_bytes = 64 << 20 if rng.random() < 0.5 else 4096
            child = os.fork()
            if not child:
                os.close(receive)
                write_until_killed(folder, first, send, batch_bytes)
            os.close(send)
            writers.append((child, receive))
        for child, receive in writers:
            # Killed a random moment after so many reports: while it opens, first writes, goes on.
            data = b"".join(os.read(receive, 4) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5])))
            time.sleep(rng.uniform(0.0, 0.004))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            while part := os.read(receive, 1 << 16):
                data += part
            os.close(receive)
            killed_while_writing += data.startswith(b"open")
            data = data.removeprefix(b"open")
            whole = len(data) // 4
            committed += struct.unpack(f"<{whole}i", data[: 4 * whole])
        if pair % 50 == 49:
            child = os.fork()
            if not child:
                check(folder, committed, walk=False)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    present = check(folder, committed, walk=True)
    print(kills, killed_while_writing, len(committed), present)


if __name__ == "__main__":
    main()
