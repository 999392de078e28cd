"""Threads for calls that may hang: daemons that a caller can leave behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Workers"]

_T = TypeVar("_T")

_IDLE_SECONDS = 30.0


class Workers:
    """At most `limit` daemon threads, started when needed and gone when idle.

    Unlike a ThreadPoolExecutor's they are not waited for at exit: a call that hangs on a dead disk
    or server must not keep the process.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._threads = self._idle = self._queued = 0

    def submit(self, job: Callable[[], _T]) -> Future[_T]:
        """Run `job` on a thread; a future that is cancelled before it starts is never run."""
        future: Future[_T] = Future()
        with self._lock:
            self._jobs.put((future, job))
            self._queued += 1
            if self._queued > self._idle and self._threads < self._limit:
                self._threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                future, job = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    self._idle -= 1
                    if self._queued:
                        continue
                    self._threads -= 1
                    return
            with self._lock:
                self._idle -= 1
                self._queued -= 1
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            del future, job  # a waiting thread must not keep the last job's buffers
