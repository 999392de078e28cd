"""Questions over the same documents, recovered once: each is answered as if it were asked alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

from redknot import Dense, Engine, HeadMap, Naive, RedKnot
from redknot.engine.shared import group_by_beginning
from redknot.errors import InputError

WINDOW = 12
HEADS = HeadMap([["global", "local"], ["local", "local"], ["local", "global"]], window=WINDOW)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), HEADS, kv_budget="16MiB", page_size=4)


@pytest.fixture(scope="module")
def documents(engine):
    rng = np.random.default_rng(3)
    return [engine.add(random_tokens(rng, n)) for n in (30, 9, 41)]


def questions():
    rng = np.random.default_rng(4)
    head = random_tokens(rng, 3)
    alike = [head + random_tokens(rng, n) for n in (2, 7, 1)]
    return [alike[0], [5], alike[1], [6, 7, 8], alike[2], [5, 9, 9], [6]]


@pytest.mark.parametrize("policy", [Dense(), Naive(), RedKnot(), RedKnot(boundary_rows=4)])
def test_every_answer_is_that_of_the_question_alone(engine, documents, policy):
    shared = engine.generate_shared(documents, questions(), policy=policy, max_new_tokens=8)
    for ids, answer in zip(questions(), shared, strict=True):
        alone = engine.generate(documents, ids, policy=policy, max_new_tokens=8)
        assert answer.token_ids == alone.token_ids
        assert answer.prompt_token_ids == alone.prompt_token_ids
        torch.testing.assert_close(answer.first_logits, alone.first_logits, atol=1e-4, rtol=1e-4)


def test_no_page_is_left_behind(engine, documents):
    free = engine.kv_stats()["num_free_pages"]
    engine.generate_shared(documents, questions(), max_new_tokens=2)
    with pytest.raises(InputError, match="max_new_tokens"):
        engine.generate_shared(documents, questions(), max_new_tokens=0)
    assert engine.kv_stats()["num_free_pages"] == free
    assert engine.kv_stats()["num_sessions"] == 0


def test_groups_leave_every_member_a_token_of_its_own():
    groups = group_by_beginning([np.array(ids) for ids in questions()])
    assert groups == [(3, [0, 2, 4]), (1, [1]), (3, [3]), (3, [5]), (1, [6])]
    repeated = [np.array([4, 4, 4]), np.array([4, 4, 4])]
    assert group_by_beginning(repeated) == [(2, [0, 1])]
