"""Many sessions over one pool: admitted as they fit, decoded together, preempted when it is short.

One step admits what fits, then decodes one token of every running session with one op call per
layer. Sessions come and go between steps. All methods are called under `lock`.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from redknot._memory import OutOfPages
from redknot.engine.admission import Admission
from redknot.engine.generation import GenerationLoop, Request
from redknot.engine.runner import Runner
from redknot.engine.sampling import Sampling
from redknot.engine.session import GenerationRequest, Session
from redknot.errors import BudgetError, RedknotError
from redknot.recovery import Policy

__all__ = ["Scheduler", "SchedulerStats"]


@dataclass
class SchedulerStats:
    """Counts since the engine was made."""

    admitted: int = 0
    finished: int = 0
    preemptions: int = 0
    resumptions: int = 0
    swapped_out_pages: int = 0


class Scheduler:
    """Sessions of one engine.

    First come, first served: nobody overtakes a session that waits, and preempted ones come back
    before new ones are admitted. The newest is preempted first.
    """

    def __init__(
        self,
        runner: Runner,
        admission: Admission,
        tokenizer: Any,
        policy: Policy,
        lock: threading.RLock,
    ) -> None:
        self._runner = runner
        self._admission = admission
        self._loop = GenerationLoop(
            runner, tokenizer, max_new_tokens=1, stop=(), make_room=self.make_room
        )
        self._policy = policy
        self.lock = lock
        self.waiting: deque[Session] = deque()
        self.running: list[Session] = []  # in the order of admission
        self.swapped: list[Session] = []  # preempted, in the order of admission
        self.paused: list[Session] = []
        self.stats = SchedulerStats()
        self._numbers = itertools.count()
        self._is_blocked = False  # the first in line found no room, and nothing has changed since

    # --- from outside ----------------------------------------------------------------------------

    def submit(
        self, request: GenerationRequest, question_ids: np.ndarray, offset: int = 0
    ) -> list[Session]:
        """Queue a request: `n` sessions. `offset` is added to the seed. Nothing is computed yet."""
        self._admission.check(request.documents, question_ids, request.max_new_tokens)
        sessions = [
            Session(self, request, question_ids, next(self._numbers)) for _ in range(request.n)
        ]
        for number, session in enumerate(sessions):
            session.sampling = request.sampling.for_request(offset + number)
        sessions[0].siblings = sessions[1:]
        self.waiting.append(sessions[0])
        return sessions

    def step(self) -> None:
        """Bring back and admit what fits, then decode one token of every running session."""
        self._resume_swapped()
        if not self.swapped:
            self._admit_waiting()
        if not self.running:
            return
        try:
            pieces = self._loop.step()
        except BudgetError as error:
            if len(self.running) != 1:
                raise
            self._fail(self.running[0], error)
        else:
            self._give_out(pieces)

    def fork(self, session: Session, sampling: Sampling | None) -> Session:
        """A running session that stands where `session` stands."""
        assert session.active is not None
        fork = Session(self, session.request, session.question_ids, next(self._numbers))
        fork.sampling = sampling or session.sampling
        fork.active = self._loop.fork(session.active, fork.number, sampling)
        fork.state = "running"
        self.running.append(fork)
        return fork

    def pause(self, session: Session) -> None:
        """Swap a running or preempted session out until `resume`."""
        if session.state == "running":
            self._swap_out(session)
        self.swapped.remove(session)
        self.paused.append(session)
        session.state = "paused"

    def resume(self, session: Session) -> None:
        """Let a paused session come back."""
        self.paused.remove(session)
        self.swapped.append(session)
        self.swapped.sort(key=lambda other: other.number)
        session.state = "preempted"

    def cancel(self, session: Session) -> None:
        """Release a session, whatever it does."""
        if session.is_done:
            return
        if session in self.waiting and session.siblings:  # another of the n takes its place
            heir, *heir.siblings = [s for s in session.siblings if not s.is_done] or [session]
            if heir is not session:
                self.waiting[self.waiting.index(session)] = heir
        self._leave(session)
        session.state = "cancelled"

    def make_room(self, missing: OutOfPages) -> None:
        """Free pages for a decode step: what is only kept for later, then the newest session."""
        try:
            self._admission.make_room((), missing, "a decode step")
        except BudgetError:
            if len(self.running) > 1:
                self._swap_out(self.running[-1])
            elif not self._swap_out_rest():
                raise

    # --- one step --------------------------------------------------------------------------------

    def _resume_swapped(self) -> None:
        pool = self._runner.pool
        for session in list(self.swapped):
            assert session.active is not None
            while True:
                try:
                    # With others running, room for what they and it may need is asked for first.
                    if self.running:
                        self._admission.check_swap_in(
                            session.active.session, self._reserved(), self._reserve(session)
                        )
                    pool.swap_in(session.active.session)
                    break
                except OutOfPages as missing:
                    try:
                        self._admission.make_room((), missing, "a session that comes back")
                    except BudgetError as error:
                        if self.running:
                            return
                        if not self._swap_out_rest():
                            self._fail(session, error)
                            break
            if session.is_done:
                continue
            self.swapped.remove(session)
            self.running.append(session)
            self.running.sort(key=lambda other: other.number)
            self._loop.add(session.active)
            session.state = "running"
            self.stats.resumptions += 1

    def _admit_waiting(self) -> None:
        while self.waiting and not self._is_blocked:
            session = self.waiting[0]
            try:
                self._admit(session)
            except BudgetError as error:
                if self.running or self._swap_out_rest():
                    self._is_blocked = bool(self.running)
                    continue
                self._fail(session, error)
            except RedknotError as error:  # such as documents that were cleared meanwhile
                self._fail(session, error)
            except BaseException:
                self.cancel(session)
                raise

    def _admit(self, session: Session) -> None:
        request, started = session.request, time.perf_counter()
        group = [session, *session.siblings]
        admitted = self._admission.admit(
            request.documents,
            session.question_ids,
            request.policy or self._policy,
            new_tokens=math.ceil(request.reserve * request.max_new_tokens),
            copies=len(group),
            reserved=self._reserved(),
            share_recovered=request.share_recovered,
        )
        allocator = self._runner.pool.allocator
        handles = [admitted.session]
        handles += [allocator.fork_session(admitted.session) for _ in session.siblings]
        self.waiting.popleft()
        session.siblings = []
        self.stats.admitted += len(group)
        for member, handle in zip(group, handles, strict=True):
            if member.is_done:  # cancelled while it waited
                allocator.release_session(handle)
                continue
            active = Request(member.number, handle, admitted.rules, admitted.prefill)
            active.queued_seconds = started - member.submitted
            member.active, member.state = active, "running"
            self.running.append(member)
            self._give_out(
                self._loop.start(
                    active,
                    member.sampling,
                    max_new_tokens=request.max_new_tokens,
                    stop=[request.stop] if isinstance(request.stop, str) else request.stop,
                )
            )

    def _give_out(self, pieces: list[tuple[int, str]]) -> None:
        texts = dict(pieces)
        for session in list(self.running):
            assert session.active is not None
            if session.number in texts:
                session.put(texts[session.number])
            if session.active.finish_reason:
                self._leave(session)
                session.state = "finished"
                self.stats.finished += 1

    # --- room ------------------------------------------------------------------------------------

    def _reserved(self) -> dict[int, int]:
        """Tokens that admission keeps room for, by allocator session."""
        return {s.active.session: self._reserve(s) for s in self.running if s.active is not None}

    def _reserve(self, session: Session) -> int:
        """At least a page for each row, or a session could come back only to go again."""
        assert session.active is not None
        remaining = session.active.remaining
        share = math.ceil(session.request.reserve * remaining)
        return min(remaining, max(share, self._runner.pool.page_size))

    def _swap_out(self, session: Session) -> None:
        """Preempt a running session."""
        assert session.active is not None
        self.running.remove(session)
        self._loop.remove(session.active)
        self.swapped.append(session)
        self.swapped.sort(key=lambda other: other.number)
        session.state = "preempted"
        session.active.num_preemptions += 1
        self.stats.preemptions += 1
        self._swap_out_rest()
        self._is_blocked = False

    def _swap_out_rest(self) -> bool:
        """Move out what swapped and paused sessions hold alone; what was shared may be so now."""
        held = [s.active.session for s in (*self.swapped, *self.paused) if s.active is not None]
        moved = self._runner.pool.swap_out(held) if held else 0
        self.stats.swapped_out_pages += moved
        return moved > 0

    def _fail(self, session: Session, error: RedknotError) -> None:
        for member in (session, *session.siblings):
            self._leave(member)
            member.state, member.error = "failed", error

    def _leave(self, session: Session) -> None:
        """Take a session out of whatever it is in, and release its pages."""
        if session in self.running and session.active is not None:
            self._loop.remove(session.active)
        for place in (self.waiting, self.running, self.swapped, self.paused):
            if session in place:
                place.remove(session)
        if session.active is not None:
            self._runner.pool.allocator.release_session(session.active.session)
        self._is_blocked = False
