"""What a caller asks for, and holds while it is answered: `GenerationRequest` and `Session`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from redknot.checks import check_count, check_share
from redknot.engine.generation import Request
from redknot.engine.prompt import TextOrIds
from redknot.engine.results import Generation
from redknot.engine.sampling import Sampling
from redknot.errors import InputError, RedknotError
from redknot.recovery import Policy

if TYPE_CHECKING:
    from redknot.engine.scheduler import Scheduler

__all__ = ["GenerationRequest", "Session", "State"]

State = Literal["waiting", "running", "preempted", "paused", "finished", "failed", "cancelled"]


@dataclass(frozen=True)
class GenerationRequest:
    """One request of `Engine.run` or `Engine.submit`.

    Parameters
    ----------
    documents : sequence of str
        Ids from `Engine.add`, in the order of the prompt; may be empty.
    question : str or token ids
        What stands behind the documents.
    max_new_tokens : int
        At least 1.
    policy : Policy, optional
        Instead of the engine's. `Dense()` gives the monolithic cache: all heads global.
    sampling : Sampling
        Default: greedy.
    stop : sequence of str
        Generation ends before the first of these texts.
    n : int
        Answers to the same prompt, which is prefilled once; answer i uses the seed + i.
    share_recovered : bool
        Continue from documents that an earlier request has recovered in the same order under the
        same policy, and keep them for the next one.
    reserve : float
        Share of `max_new_tokens` that admission keeps free in the pool. Below 1 more requests run
        at once, and the newest are swapped to host memory when the pool becomes short.
    """

    documents: Sequence[str]
    question: TextOrIds
    max_new_tokens: int = 64
    policy: Policy | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    n: int = 1
    share_recovered: bool = True
    reserve: float = 1.0

    def __post_init__(self) -> None:
        for option in ("max_new_tokens", "n"):
            check_count(option, getattr(self, option))
        check_share("reserve", self.reserve, zero=True)
        _check_sampling(self.sampling)
        if self.policy is not None:
            Policy.checked(self.policy)


def _check_sampling(sampling: object) -> None:
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a Sampling, got {sampling!r}")


class Session:
    """A request in the engine: iterate over its text, or wait for its result.

    Whoever waits for one session drives all that run: each step decodes one token of every running
    session. May be used from any thread; a session that nobody waits for holds its pages until it
    is finished or cancelled.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        request: GenerationRequest,
        question_ids: np.ndarray,
        number: int,
    ) -> None:
        self._scheduler = scheduler
        self.request = request
        self.question_ids = question_ids
        self.number = number  # by which the decode loop names it
        self.sampling = request.sampling
        self.state: State = "waiting"
        self.error: RedknotError | None = None
        self.active: Request | None = None
        self.siblings: list[Session] = []  # the other n - 1 answers, not yet prefilled
        self.submitted = time.perf_counter()
        self._pieces: deque[str] = deque()

    # --- reading ---------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether no more text will come."""
        return self.state in ("finished", "failed", "cancelled")

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they become certain; each is given once."""
        while True:
            with self._scheduler.lock:
                if not self._pieces and not self.is_done:
                    self._drive()
                pieces, done = self.pieces(), self.is_done
            yield from pieces
            if done:
                if self.error is not None:
                    raise self.error
                return

    def result(self) -> Generation:
        """The whole answer, once it is finished.

        Raises
        ------
        BudgetError
            When the pool could not take the request although nothing else ran.
        InputError
            When it was cancelled, or is paused.
        """
        while True:
            with self._scheduler.lock:
                if self.is_done:
                    break
                self._drive()
        if self.error is not None:
            raise self.error
        if self.state == "cancelled" or self.active is None:
            raise InputError("the session was cancelled")
        return self.active.result()

    def pieces(self) -> list[str]:
        """Text that is there and was not given yet."""
        with self._scheduler.lock:
            pieces = list(self._pieces)
            self._pieces.clear()
            return pieces

    def put(self, piece: str) -> None:
        """Take a piece of text for whoever reads."""
        self._pieces.append(piece)

    def _drive(self) -> None:
        if self.state == "paused":
            raise InputError("the session is paused; call resume() first")
        self._scheduler.step()

    # --- steering --------------------------------------------------------------------------------

    def fork(self, sampling: Sampling | None = None) -> Session:
        """Another session that continues from here; pages are shared until either writes.

        With `sampling` it draws by these rules; without, it would say the same. A session that
        still waits is started first.
        """
        if sampling is not None:
            _check_sampling(sampling)
        with self._scheduler.lock:
            while self.state in ("waiting", "preempted"):
                self._drive()
            if self.state != "running":
                raise InputError(f"only a running session can be forked, this one is {self.state}")
            return self._scheduler.fork(self, sampling)

    def pause(self) -> None:
        """Swap the session out to host memory until `resume`; its pages are free for others."""
        with self._scheduler.lock:
            while self.state == "waiting":
                self._drive()
            if self.state in ("running", "preempted"):
                self._scheduler.pause(self)
            elif self.state != "paused":
                raise InputError(f"only a running session can be paused, this one is {self.state}")

    def resume(self) -> None:
        """Let a paused session go on, bit by bit as it was, as soon as there is room."""
        with self._scheduler.lock:
            if self.state != "paused":
                raise InputError(f"only a paused session can resume, this one is {self.state}")
            self._scheduler.resume(self)

    def cancel(self) -> None:
        """Give everything back; of a finished session nothing is left to give."""
        with self._scheduler.lock:
            self._scheduler.cancel(self)
