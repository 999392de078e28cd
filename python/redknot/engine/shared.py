"""Several questions over the same documents, which are recovered once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from redknot._memory import OutOfPages
from redknot.engine.admission import Admission, Admitted
from redknot.engine.generation import GenerationLoop, Request
from redknot.engine.runner import Runner
from redknot.engine.sampling import Sampling
from redknot.recovery import Policy

__all__ = ["group_by_beginning", "start_shared"]


def group_by_beginning(questions: Sequence[np.ndarray]) -> list[tuple[int, list[int]]]:
    """Groups of questions that begin alike, as (number of common tokens, indices of the questions).

    Of each question in a group of several, at least one token is left out of the common ones.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(questions):
        alone = len(ids) == 1
        groups.setdefault((int(ids[0]), index if alone else -1), []).append(index)
    found = []
    for members in groups.values():
        common = len(questions[members[0]])
        if len(members) > 1:
            shortest = min(len(questions[i]) for i in members)
            heads = np.stack([questions[i][: shortest - 1] for i in members])
            common = int((heads == heads[0]).all(axis=0).cumprod().sum())
        found.append((common, members))
    return found


def start_shared(
    admission: Admission,
    runner: Runner,
    loop: GenerationLoop,
    documents: Sequence[str],
    questions: Sequence[np.ndarray],
    policy: Policy,
    *,
    max_new_tokens: int,
    make_room: Callable[[OutOfPages], None],
) -> list[int]:
    """Prefill all questions into `loop`; returns the number of each question's request.

    Questions that begin alike go through one prefill of documents and common beginning; each then
    continues from a fork of that session, whose expired pages are gone like while decoding.
    """
    allocator = runner.pool.allocator
    numbers = [0] * len(questions)
    for common, members in group_by_beginning(questions):
        admitted = admission.admit(
            documents,
            questions[members[0]][:common],
            policy,
            new_tokens=max(len(questions[i]) for i in members) - common + max_new_tokens,
            reserved=dict.fromkeys(loop.sessions, max_new_tokens),
        )
        rest = [questions[i][common:] for i in members]
        if len(members) == 1 and not len(rest[0]):
            requests = [Request(0, admitted.session, admitted.rules, admitted.prefill)]
        else:
            try:
                requests = _fork(runner, admitted, rest, make_room)
            finally:
                allocator.release_session(admitted.session)
        for index, request in zip(members, requests, strict=True):
            numbers[index] = request.number = len(loop.sessions)
            loop.start(request, Sampling())  # nobody reads along
    return numbers


def _fork(
    runner: Runner,
    admitted: Admitted,
    rest: Sequence[np.ndarray],
    make_room: Callable[[OutOfPages], None],
) -> list[Request]:
    allocator, prefill = runner.pool.allocator, admitted.prefill
    forks: list[int] = []
    try:
        forks += [allocator.fork_session(admitted.session) for _ in rest]
        token_ids = torch.as_tensor(np.concatenate(rest), device=runner.decoder.device)
        while True:
            try:
                logits = runner.extend(
                    forks, token_ids, [len(ids) for ids in rest], [admitted.rules] * len(forks)
                )
                break
            except OutOfPages as missing:
                make_room(missing)
    except BaseException:
        for fork in forks:
            allocator.release_session(fork)
        raise
    return [
        Request(
            0,
            fork,
            admitted.rules,
            replace(prefill, logits=row, token_ids=[*prefill.token_ids, *ids.tolist()]),
        )
        for fork, row, ids in zip(forks, logits, rest, strict=True)
    ]
