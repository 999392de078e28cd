"""Items in a Redis or Valkey server: the tier that machines share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from redknot.errors import StoreError
from redknot.store.backend import ItemWrite, RangeRead, Status

__all__ = ["RedisBackend"]

# The number is the store format's: a server may hold stores of several versions.
_PREFIX = "redknot:1:"
_SCAN_COUNT = 1000


class RedisBackend:
    """`redis://host:port/db`, `rediss://` (TLS), `unix://`. See `StorageBackend`.

    Nothing is sent before the first call: a server that is down is a status, not an exception.
    """

    name = "redis"
    may_block = True

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ImportError:
            raise StoreError(
                "redis: needs the package redis: pip install 'redknot[redis]'"
            ) from None
        self._redis = redis
        self._url = url
        self._clients: dict[float, Any] = {}  # by timeout, which is a property of a connection
        try:
            self._client(5.0)
        except ValueError as error:
            raise StoreError(f"not a redis URL: {url}: {error}") from None

    def _client(self, timeout: float) -> Any:
        if timeout not in self._clients:
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            self._clients[timeout] = self._redis.Redis.from_url(
                self._url,
                protocol=2,
                retry=Retry(NoBackoff(), 0),  # whether to ask again is for the tier to say
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
            )
        return self._clients[timeout]

    @contextlib.contextmanager
    def _call(self, timeout: float) -> Iterator[tuple[Any, list[Status]]]:
        """Give (client, []); a failure lands in the list, and the connection is given up.

        Whatever else is in flight on a connection that failed or answered nonsense would be taken
        for the answer to the next question.
        """
        failed: list[Status] = []
        client = self._client(timeout)
        try:
            yield client, failed
        except Exception as error:  # garbage makes the client raise about anything
            failed.append(self._status(error))
            with contextlib.suppress(Exception):
                client.connection_pool.disconnect()

    def _status(self, error: Exception) -> Status:
        errors = self._redis.exceptions
        if isinstance(error, errors.TimeoutError):
            return Status.TIMEOUT
        if isinstance(error, errors.InvalidResponse):
            return Status.CORRUPT
        if isinstance(error, errors.OutOfMemoryError) or "OOM" in str(error):
            return Status.FULL
        if isinstance(error, errors.ConnectionError):
            return Status.UNREACHABLE
        return Status.ERROR

    def get(self, keys: Sequence[str], timeout: float) -> list[bytes | Status]:
        """See `StorageBackend`."""
        with self._call(timeout) as (client, failed), client.pipeline(transaction=False) as batch:
            for key in keys:
                batch.get(_PREFIX + key)
            answers = batch.execute()
            return [
                answer if isinstance(answer, bytes)
                else Status.MISSING if answer is None
                else Status.CORRUPT
                for answer in answers
            ]  # fmt: skip
        return [failed[0]] * len(keys)

    def get_ranges(self, reads: Sequence[RangeRead], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        statuses: list[Status] = []
        with self._call(timeout) as (client, failed):
            for read in reads:  # one by one: a pipeline would hold every answer in memory at once
                statuses.append(self._get_ranges(client, read))
        return statuses + failed * (len(reads) - len(statuses))

    def _get_ranges(self, client: Any, read: RangeRead) -> Status:
        key = _PREFIX + read.key
        if list(read.ranges) == [(0, read.size)]:
            whole = client.get(key)
            answers = [whole if whole is not None else b""]
            size = len(answers[0])
        else:
            with client.pipeline(transaction=False) as batch:
                batch.strlen(key)
                for offset, length in read.ranges:
                    batch.getrange(key, offset, offset + length - 1)
                size, *answers = batch.execute()
        if size == 0:
            return Status.MISSING
        if size != read.size:
            return Status.SHORT
        at = 0
        for answer, (_, length) in zip(answers, read.ranges, strict=True):
            if not isinstance(answer, bytes) or len(answer) != length:
                return Status.SHORT
            read.out[at : at + length] = answer
            at += length
        return Status.OK

    def put(self, items: Sequence[ItemWrite], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        statuses: list[Status] = []
        with self._call(timeout) as (client, failed):
            for item in items:
                client.set(_PREFIX + item.key, item.data)
                statuses.append(Status.OK)
        return statuses + failed * (len(items) - len(statuses))

    def remove(self, keys: Sequence[str], timeout: float) -> list[Status]:
        """See `StorageBackend`."""
        with self._call(timeout) as (client, failed), client.pipeline(transaction=False) as batch:
            for key in keys:
                batch.unlink(_PREFIX + key)
            return [Status.OK if answer else Status.MISSING for answer in batch.execute()]
        return [failed[0]] * len(keys)

    def sizes(self, prefix: str, timeout: float) -> Mapping[str, int] | Status:
        """See `StorageBackend`."""
        with self._call(timeout) as (client, failed):
            keys = list(client.scan_iter(match=f"{_PREFIX}{prefix}*", count=_SCAN_COUNT))
            with client.pipeline(transaction=False) as batch:
                for key in keys:
                    batch.strlen(key)
                lengths = batch.execute()
            names = [key.decode().removeprefix(_PREFIX) for key in keys]
            return dict(zip(names, lengths, strict=True))
        return failed[0]

    def used_bytes(self, timeout: float) -> int | Status:
        """Memory of the whole server, whoever uses it."""
        with self._call(timeout) as (client, failed):
            return int(client.info("memory")["used_memory"])
        return failed[0]

    def close(self) -> None:
        """See `StorageBackend`."""
        for client in self._clients.values():
            with contextlib.suppress(Exception):
                client.close()
