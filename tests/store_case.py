"""Segments of random bytes, and a Redis server of the tests' own."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from redknot.store.layout import NeededTokens, Regions, SegmentShape
from redknot.store.manifest import Manifest, seal
from redknot.store.tiers import expected_of

__all__ = ["RedisServer", "expected_of", "heads_needed", "key_of", "make_segment", "needs_redis"]

FINGERPRINT = "model-a"
SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
needs_redis = pytest.mark.skipif(
    SERVER is None, reason="neither redis-server nor valkey-server is installed"
)


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def make_segment(
    number: int,
    *,
    layers: int = 3,
    heads: int = 4,
    tokens: int = 100,
    page_size: int = 16,
    row_bytes: int = 64,
    global_heads: tuple[int, ...] = (1,),
    window: int = 20,
    sink: int = 4,
    hidden_bytes: int = 0,
    created: float | None = None,
) -> tuple[Manifest, list[memoryview | None], np.ndarray]:
    """A sealed segment whose bytes follow from its number: manifest, objects, all its bytes."""
    shape = SegmentShape(layers, heads, tokens, page_size, row_bytes)
    is_global = np.zeros((layers, heads), dtype=bool)
    is_global[:, list(global_heads)] = True
    regions = Regions.of_heads(
        is_global,
        np.where(is_global, -1, window).astype(np.int32),
        np.where(is_global, 0, sink).astype(np.int32),
        page_size,
        shape.num_pages,
    )
    manifest = Manifest(
        key=key_of(number),
        fingerprint=FINGERPRINT,
        dtype="bfloat16",
        shape=shape,
        regions=regions,
        first_position=1,
        offline_flops=1e9,
        offline_seconds=1.0,
        created=time.time() if created is None else created,
        write_id=f"{number:012x}",
        checksums=np.empty(0, dtype="<u8"),
        hidden_layer=1 if hidden_bytes else -1,
        hidden_bytes=hidden_bytes,
    )
    rng = np.random.default_rng(number)
    pages = rng.integers(0, 256, manifest.layout.num_bytes, dtype=np.uint8)
    hidden = rng.integers(0, 256, manifest.num_hidden_bytes, dtype=np.uint8)
    return *seal(manifest, pages, hidden if hidden_bytes else None), pages


def heads_needed(manifest: Manifest, heads: tuple[int, ...]) -> NeededTokens:
    """All tokens of some KV heads of every layer."""
    shape = manifest.shape
    group = np.zeros((shape.num_layers, shape.num_kv_heads), dtype=np.int64)
    group[:, list(heads)] = 1
    return NeededTokens(np.array([[False] * shape.num_tokens, [True] * shape.num_tokens]), group)


class RedisServer:
    """A server on a free port of this machine, without persistence."""

    def __init__(self, folder: Path) -> None:
        assert SERVER is not None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir"]
        self._command = [SERVER, *arguments, str(folder)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.kill()
