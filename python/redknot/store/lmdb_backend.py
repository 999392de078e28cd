"""Items in an LMDB environment: the embedded default, shared by the processes of one machine.

No writemap: a full disk is then an error of one transaction, not the end of the process. What a
damaged file could do to a process that maps it (a signal) is found out by a process of its own,
before the environment is opened; whether the file was cut off meanwhile, before every transaction.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from redknot.errors import StoreDamagedError, StoreError
from redknot.store.backend import ItemWrite, RangeRead, Status

__all__ = ["LmdbBackend"]

_T = TypeVar("_T")

_FORMAT_KEY = b"redknot-store"
_FORMAT = b"1"
# Address space, not disk: the file grows as it is written.
_MAP_BYTES = 1 << 40
_CHECK_SECONDS = 60.0

# Walks every key as any reader would, and tries the free list as a writer would. It must not import
# redknot: it is started for every opening.
_CHECK = """
import lmdb, os, sys
def refuse(reason):
    print(reason, file=sys.stderr)
    sys.exit(3)
path, format_key, format = sys.argv[1], sys.argv[2].encode(), sys.argv[3].encode()
try:
    env = lmdb.open(path, create=False, readonly=True, map_size=0, max_readers=512)
    info, stat = env.info(), env.stat()
    needed = (info["last_pgno"] + 1) * stat["psize"]
    size = os.stat(os.path.join(path, "data.mdb")).st_size
    # Pages that a transaction took and gave back are not written, so the file's end may miss by
    # right; whether anything that is in use misses is found out by touching all of it.
    is_short = size < needed
    if is_short:
        message = f"data.mdb has {size} bytes, but its pages need {needed}: it was truncated"
        print(message, file=sys.stderr, flush=True)
    with env.begin(buffers=True) as txn:
        found = txn.get(format_key)
        if found is None and stat["entries"]:
            refuse("it is an LMDB environment of something else")
        if found is not None and bytes(found) != format:
            refuse(f"it has store format {bytes(found).decode(errors='replace')}, "
                   f"this version reads format {format.decode()}")
        count = 0
        for key, value in txn.cursor():
            count += 1
            if bytes(key[:2]) == b"m/":
                bytes(value)
            elif is_short:
                bytes(memoryview(value)[::4096])
        if count != stat["entries"]:
            sys.exit(f"it holds {count} entries instead of {stat['entries']}: it is damaged")
except lmdb.Error as error:
    sys.exit(f"it cannot be read: {error}")
"""

# How often, and how long apart, a file that seems cut off is looked at before it is given up: its
# writer may be about to extend it.
_LOOKS, _LOOK_SECONDS = 5, 0.01

_open_lock = threading.Lock()
_open: dict[str, _Environment] = {}  # LMDB allows a file to be opened once per process


class _CutOffError(Exception):
    """The file is shorter than what it holds: a look at the missing part would be a signal."""


class _Environment:
    """An open LMDB environment that notices when its file was cut off behind its back.

    A file of LMDB never shrinks by itself, and writers here see to it that it is as long as its
    first pages say. So one that is shorter was cut off; nothing of it is touched from then on.
    """

    def __init__(self, env: Any, folder: str) -> None:
        self.env, self.users = env, 0
        self.page_bytes: int = env.stat()["psize"]
        self._data = os.path.join(folder, "data.mdb")
        self._lock = threading.Lock()
        self._least = 2 * self.page_bytes  # what the file surely had at some time
        self._is_cut_off = False
        self.extend()

    def _needed(self) -> int:
        """Bytes that the first two pages speak of."""
        return int(self.env.info()["last_pgno"] + 1) * self.page_bytes

    def begin(self, **options: Any) -> Any:
        """Begin a transaction.

        Raises
        ------
        _CutOffError
            When the file was cut off, now or earlier.
        """
        with self._lock:
            if not self._is_cut_off:
                try:
                    self._is_cut_off = not self._is_whole()
                except FileNotFoundError:
                    pass  # the directory is gone; what is mapped is not
            if self._is_cut_off:
                raise _CutOffError
        return self.env.begin(**options)

    def _is_whole(self) -> bool:
        if os.stat(self._data).st_size < self._least:  # the first pages, too, may be gone
            return False
        for look in range(_LOOKS):
            needed = self._needed()
            size = os.stat(self._data).st_size
            if size >= needed:
                self._least = size
                return True
            if look + 1 < _LOOKS:
                time.sleep(_LOOK_SECONDS)
        return False

    def extend(self) -> None:
        """Make the file as long as its first pages say; a transaction may leave pages out."""
        with contextlib.suppress(OSError):  # on a full disk it stays as it is
            needed = self._needed()
            if os.stat(self._data).st_size < needed:
                fd = os.open(self._data, os.O_RDWR)
                try:
                    os.posix_fallocate(fd, needed - 1, 1)  # never makes it shorter
                finally:
                    os.close(fd)


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError:
        raise StoreError("lmdb: needs the package lmdb: pip install 'redknot[lmdb]'") from None
    return lmdb


def _check(path: Path) -> None:
    """Raise StoreError unless the environment can be walked without harm."""
    command = [sys.executable, "-c", _CHECK, str(path), _FORMAT_KEY.decode(), _FORMAT.decode()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        raise StoreDamagedError(
            f"the store {path} could not be read in {_CHECK_SECONDS:.0f} s"
        ) from None
    if done.returncode == 0:
        return
    reason = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else []
    said = reason[0] if reason else f"reading it ends a process with signal {-done.returncode}"
    if done.returncode == 3:
        raise StoreError(f"the store {path} is not usable: {said}; choose another directory")
    raise StoreDamagedError(
        f"the store {path} is not usable: {said}; move the directory away to start an empty one"
    )


class LmdbBackend:
    """`lmdb:///path`: one LMDB environment in a directory. See `StorageBackend`.

    Parameters
    ----------
    path : Path
        Directory on a local disk; made if need be.
    map_bytes : int
        Most bytes that the file may grow to.
    create : bool
        Whether a store that does not exist is made.
    check : bool
        Whether another process walks the environment first; damage then is an error, not a signal.

    Raises
    ------
    StoreError
        When the environment is damaged, of another format, or not a store.
    """

    name = "lmdb"
    may_block = True

    def __init__(
        self,
        path: Path,
        *,
        map_bytes: int = _MAP_BYTES,
        create: bool = True,
        check: bool = True,
    ) -> None:
        self._lmdb = _lmdb()
        self._path = os.path.realpath(path)
        exists = (Path(self._path) / "data.mdb").exists()
        if not exists and not create:
            raise StoreError(f"there is no store at {path}")
        with _open_lock:
            if self._path not in _open:
                if exists and check:
                    _check(Path(self._path))
                _open[self._path] = _Environment(self._open_env(path, map_bytes), self._path)
            self._env = _open[self._path]
            self._env.users += 1
        self._closed = False

    def _open_env(self, path: Path, map_bytes: int) -> Any:
        try:
            Path(self._path).mkdir(parents=True, exist_ok=True)
            env = self._lmdb.open(
                self._path, map_size=map_bytes, writemap=False, max_readers=512, max_spare_txns=8
            )
            env.reader_check()  # slots of readers that were killed
            with env.begin(write=True) as txn:
                if txn.get(_FORMAT_KEY) is None:
                    txn.put(_FORMAT_KEY, _FORMAT)
            return env
        except (OSError, self._lmdb.Error) as error:
            raise StoreError(f"the store {path} cannot be opened: {error}") from None

    def _status(self, error: Exception) -> Status:
        if isinstance(error, _CutOffError):
            return Status.CORRUPT
        # LMDB reports a write that ends early, as on a full disk, as an input/output error.
        text = str(error).lower()
        full = ("no space", "too large", "input/output")
        if isinstance(error, self._lmdb.MapFullError) or any(words in text for words in full):
            return Status.FULL
        damaged = (
            self._lmdb.CorruptedError,
            self._lmdb.PageNotFoundError,
            self._lmdb.BadTxnError,
            self._lmdb.PanicError,
        )
        return Status.CORRUPT if isinstance(error, damaged) else Status.ERROR

    def _each(self, items: Sequence[_T], read: Callable[[Any, _T], Any]) -> list[Any]:
        """`read(txn, item)` for every item in one snapshot."""
        try:
            with self._env.begin(buffers=True) as txn:
                return [read(txn, item) for item in items]
        except (OSError, self._lmdb.Error, _CutOffError) as error:
            return [self._status(error)] * len(items)

    def get(self, keys: Sequence[str], timeout: float) -> list[bytes | Status]:
        """See `StorageBackend`."""

        def read(txn: Any, key: str) -> bytes | Status:
            value = txn.get(key.encode())
            return Status.MISSING if value is None else bytes(value)

        return self._each(keys, read)

    def get_ranges(self, reads: Sequence[RangeRead], timeout: float) -> list[Status]:
        """See `StorageBackend`."""

        def read(txn: Any, wanted: RangeRead) -> Status:
            value = txn.get(wanted.key.encode())
            if value is None:
                return Status.MISSING
            if len(value) != wanted.size:
                return Status.SHORT
            source = np.frombuffer(value, dtype=np.uint8)
            target = np.frombuffer(wanted.out, dtype=np.uint8)
            at = 0
            for offset, length in wanted.ranges:  # numpy lets other threads run meanwhile
                target[at : at + length] = source[offset : offset + length]
                at += length
            return Status.OK

        return self._each(reads, read)

    def put(self, items: Sequence[ItemWrite], timeout: float) -> list[Status]:
        """Store the items in one transaction: all of them or none."""
        status = self._write(items)
        if status is Status.FULL:
            # Pages that the last transaction freed can be used only after one more.
            if self._write([ItemWrite(_FORMAT_KEY.decode(), _FORMAT)]) is Status.OK:
                status = self._write(items)
        return [status] * len(items)

    def _write(self, items: Sequence[ItemWrite]) -> Status:
        try:
            with self._env.begin(write=True) as txn:
                for item in items:
                    txn.put(item.key.encode(), item.data)
            self._env.extend()
            return Status.OK
        except (OSError, self._lmdb.Error, _CutOffError) as error:
            return self._status(error)

    def remove(self, keys: Sequence[str], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        try:
            with self._env.begin(write=True) as txn:
                found = [txn.delete(key.encode()) for key in keys]
            self._env.extend()
            return [Status.OK if there else Status.MISSING for there in found]
        except (OSError, self._lmdb.Error, _CutOffError) as error:
            return [self._status(error)] * len(keys)

    def sizes(self, prefix: str, timeout: float) -> Mapping[str, int] | Status:
        """See `StorageBackend`."""
        found: dict[str, int] = {}
        start = prefix.encode()
        try:
            with self._env.begin(buffers=True) as txn, txn.cursor() as cursor:
                more = cursor.set_range(start)
                while more and bytes(cursor.key()).startswith(start):
                    found[bytes(cursor.key()).decode()] = len(cursor.value())
                    more = cursor.next()
        except (OSError, self._lmdb.Error, _CutOffError) as error:
            return self._status(error)
        found.pop(_FORMAT_KEY.decode(), None)
        return found

    def used_bytes(self, timeout: float) -> int | Status:
        """Bytes of the file: pages that are free for reuse are among them."""
        try:
            with self._env.begin():
                return int(self._env.env.info()["last_pgno"] + 1) * self._env.page_bytes
        except (OSError, self._lmdb.Error, _CutOffError) as error:
            return self._status(error)

    def close(self) -> None:
        """See `StorageBackend`."""
        if self._closed:
            return
        self._closed = True
        with _open_lock:
            self._env.users -= 1
            if not self._env.users:
                _open.pop(self._path).env.close()
