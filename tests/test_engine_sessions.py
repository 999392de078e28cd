"""Many sessions over one pool: queued, decoded together, preempted, forked, shared, accounted."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engine_generate import WordTokenizer
from tiny_models import random_tokens, tiny_model

from redknot import (
    BudgetError,
    Dense,
    Engine,
    GenerationRequest,
    HeadMap,
    InputError,
    Naive,
    RedKnot,
    RedknotError,
    Sampling,
)

pytestmark = pytest.mark.transformers
HEADS = HeadMap([["local", "global"]] * 3, window=16, sink=4)
LENGTHS = (20, 33, 47, 9, 28)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", 4, 2)


def make_engine(model, kv_budget="16MiB", **options):
    engine = Engine(
        model, HEADS, tokenizer=WordTokenizer(), kv_budget=kv_budget, page_size=16,
        poison_freed_pages=True, **options,
    )  # fmt: skip
    rng = np.random.default_rng(11)
    return engine, [engine.add(random_tokens(rng, n)) for n in LENGTHS]


def requests_over(documents, **options):
    """Ragged: other documents, questions and lengths for each."""
    rng = np.random.default_rng(2)
    orders = [documents[:2], documents[::-1], [], documents[1:4], documents[2:], documents[:1]]
    return [
        GenerationRequest(
            order, random_tokens(rng, 1 + 3 * i), max_new_tokens=5 + 9 * i,
            **{"share_recovered": False, **options},
        )
        for i, order in enumerate(orders)
    ]  # fmt: skip


def alone(engine, request):
    return engine.generate(
        request.documents, request.question, max_new_tokens=request.max_new_tokens,
        policy=request.policy,
    )  # fmt: skip


@pytest.fixture(scope="module")
def setup(model):
    engine, documents = make_engine(model)
    requests = requests_over(documents)
    return engine, documents, requests, [alone(engine, r).token_ids for r in requests]


def is_idle(engine):
    """Nobody holds a page but documents and recovered chains."""
    stats, chains = engine.kv_stats(), engine.session_stats()["recovered_chains"]
    return stats["num_sessions"] == chains and stats["swapped_pages"] == 0


@pytest.mark.parametrize("policy", [None, Dense(), Naive()])
def test_many_requests_answer_like_each_alone(setup, policy):
    engine, documents, _, _ = setup
    requests = requests_over(documents, policy=policy)
    answers = engine.run(requests)
    assert [a.token_ids for a in answers] == [alone(engine, r).token_ids for r in requests]
    assert is_idle(engine)


def test_text_comes_with_the_index_of_its_result(setup):
    engine, _, requests, expected = setup
    texts = [""] * len(requests)

    def collect(index, piece):
        texts[index] += piece

    answers = engine.run(requests, on_text=collect)
    assert texts == [a.text for a in answers]
    assert [a.token_ids for a in answers] == expected


def test_requests_that_do_not_fit_yet_wait_for_others(model, setup):
    _, _, _, expected = setup
    engine, documents = make_engine(model, "520KiB")
    requests = requests_over(documents)
    answers = engine.run(requests)
    assert [a.token_ids for a in answers] == expected
    assert max(a.queued_seconds for a in answers) > 10 * min(a.queued_seconds for a in answers)
    assert engine.session_stats()["preemptions"] == 0  # all that is admitted can be finished
    assert is_idle(engine)


def test_preempted_sessions_continue_as_if_nothing_had_happened(model, setup):
    """Nothing is reserved, so the pool runs short in the middle of decoding."""
    whole, documents, _, _ = setup
    long = [replace(r, max_new_tokens=90) for r in requests_over(documents, reserve=0.0)]
    expected = [alone(whole, request).token_ids for request in long]
    engine, _ = make_engine(model, "460KiB")
    answers = engine.run(long)
    stats = engine.session_stats()
    assert stats["preemptions"] == stats["resumptions"] > 0
    assert sum(a.num_preemptions for a in answers) == stats["preemptions"]
    assert [a.token_ids for a in answers] == expected
    assert is_idle(engine)


def test_a_swapped_session_computes_the_same_bits(setup):
    """Its logits, and those of one that never left; the pool is poisoned in between."""
    engine, documents, _, _ = setup
    pool = engine.pool
    logits = []
    for leaves in (False, True):
        admitted = engine._admission.admit(documents, np.arange(3, 40), RedKnot(), new_tokens=9)
        if leaves:
            private = pool.allocator.session_private_pages(admitted.session)
            free = pool.allocator.free_pages()
            assert pool.swap_out([admitted.session]) == private > 0
            assert pool.allocator.free_pages() == free + private
            blocker = pool.allocator.create_segment(16 * 40, 0)  # other pages the second time
            assert pool.swap_in(admitted.session) == private
            pool.allocator.release_segment(blocker)
        steps = [
            engine._runner.decode([admitted.session], torch.tensor([7 + i]), [admitted.rules])
            for i in range(9)
        ]
        logits.append(torch.cat([admitted.prefill.logits[None], *steps]))
        pool.allocator.release_session(admitted.session)
    assert torch.equal(*logits)


def test_sessions_come_and_go_and_each_reader_gets_its_own_text(setup):
    engine, _, requests, _ = setup
    expected = [alone(engine, r).text for r in requests]
    (first,) = engine.submit(requests[5])
    reader = iter(first)
    pieces = [next(reader) for _ in range(4)]
    (second,) = engine.submit(requests[1])  # arrives while the first is being decoded
    assert "".join(second) == expected[1]
    assert engine.session_stats()["running"] == 1
    (third,) = engine.submit(requests[4])
    assert third.result().text == expected[4]
    assert "".join(pieces) + "".join(reader) == expected[5]
    assert is_idle(engine)


def test_an_open_stream_does_not_stop_other_threads(setup):
    engine, documents, requests, expected = setup
    stream = engine.stream(documents, [3, 4], max_new_tokens=30)
    next(stream)
    results = {}

    def work(index):
        results[index] = alone(engine, requests[index]).token_ids

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert results == {i: expected[i] for i in range(4)}
    closer = threading.Thread(target=stream.close)  # by another thread than the one that read
    closer.start()
    closer.join(timeout=60)
    assert not closer.is_alive() and is_idle(engine)


def test_parallel_samples_share_one_prefill(setup):
    engine, documents, _, _ = setup
    options = {"temperature": 1.5, "top_k": 50}
    sampling = Sampling(**options, seed=5)
    admitted = engine.session_stats()["admitted"]
    answers = engine.run(
        [GenerationRequest(documents, [3, 4, 5], 12, sampling=sampling, n=3, share_recovered=False)]
    )
    assert engine.session_stats()["admitted"] == admitted + 3
    singles = [
        engine.generate(documents, [3, 4, 5], max_new_tokens=12, seed=5 + i, **options)
        for i in range(3)
    ]
    assert [a.token_ids for a in answers] == [s.token_ids for s in singles]
    assert len({tuple(a.token_ids) for a in answers}) == 3
    assert answers[0].first_logits is answers[2].first_logits


def test_forks_share_pages_until_they_write(setup):
    engine, documents, _, _ = setup
    request = GenerationRequest(documents, [3, 4, 5], 40, share_recovered=False)
    expected = alone(engine, request)
    (session,) = engine.submit(request)
    reader = iter(session)
    for _ in range(5):
        next(reader)
    free = engine.kv_stats()["num_free_pages"]
    same, other = session.fork(), session.fork(Sampling(temperature=2.0, seed=3))
    assert engine.kv_stats()["num_free_pages"] == free
    assert same.result().token_ids == session.result().token_ids == expected.token_ids
    assert other.result().token_ids[:5] == expected.token_ids[:5]
    assert other.result().token_ids != expected.token_ids
    assert same.result().text == expected.text
    assert is_idle(engine)
    with pytest.raises(InputError, match="only a running session can be forked"):
        session.fork()


def test_a_paused_session_leaves_the_pool_and_comes_back(setup):
    engine, documents, _, _ = setup
    request = GenerationRequest(documents, [9, 8], 20, share_recovered=False)
    expected = alone(engine, request).token_ids
    idle = engine.kv_stats()["num_free_pages"]
    (session,) = engine.submit(request)
    next(iter(session))
    session.pause()
    stats = engine.kv_stats()
    assert stats["swapped_pages"] > 0 and stats["num_free_pages"] == idle
    with pytest.raises(InputError, match="paused"):
        session.result()
    session.resume()
    answer = session.result()
    assert (answer.token_ids, answer.num_preemptions) == (expected, 1)
    (session,) = engine.submit(request)
    session.pause()
    session.cancel()
    assert is_idle(engine)


def test_a_recovered_chain_is_shared_by_all_that_hold_it(model):
    engine, documents = make_engine(model)
    request = GenerationRequest(documents, [5, 6, 7], 12)
    expected = alone(engine, request)
    (first,) = engine.submit(request)
    next(iter(first))
    used = engine.kv_stats()["num_free_pages"]
    others = [engine.submit(GenerationRequest(documents, [8 + i, 6], 12))[0] for i in range(5)]
    for other in others:
        next(iter(other))
    refreshed = 3 * sum(-(-n // 16) for n in LENGTHS[1:])  # pages of moved documents, global heads
    assert used - engine.kv_stats()["num_free_pages"] <= 5 * 6 < refreshed * 5 / 4  # a page a row
    stats = engine.session_stats()
    assert (stats["recovered_chain_hits"], stats["recovered_chain_misses"]) == (5, 1)
    report = others[0].result().explain()
    assert {d.source for d in report.documents} == {"shared"}
    assert "recovered before, in this order" in report.documents[1].reason
    assert first.result().token_ids == expected.token_ids
    answers = [other.result() for other in others]
    singles = [alone(engine, other.request) for other in others]
    assert [a.token_ids for a in answers] == [s.token_ids for s in singles]
    assert all(a.ledger.flops < s.ledger.flops / 5 for a, s in zip(answers, singles, strict=True))
    for other_chain in (
        GenerationRequest(documents[::-1], [5], 2),
        GenerationRequest(documents, [5], 2, policy=Naive()),
        GenerationRequest(documents, [5], 2, policy=RedKnot(boundary_rows=3)),
    ):
        engine.run([other_chain])
    stats = engine.session_stats()
    assert (stats["recovered_chain_hits"], stats["recovered_chains"]) == (5, 4)
    engine.clear()
    assert engine.kv_stats()["num_free_pages"] == engine.kv_stats()["num_pages"]


def test_chains_go_before_requests_are_refused(model):
    engine, documents = make_engine(model, "700KiB")
    for i in range(len(documents)):
        order = documents[i:] + documents[:i]
        answer = engine.run([GenerationRequest(order, [5, 6], 12)])[0]
        assert answer.token_ids == alone(engine, GenerationRequest(order, [5, 6], 12)).token_ids
    assert engine.session_stats()["recovered_chain_evictions"] > 0


def test_what_does_not_fit_alone_is_refused_and_the_rest_goes_on(model):
    engine, documents = make_engine(model, "460KiB")
    (good,) = engine.submit(GenerationRequest(documents[:1], [5], 40, share_recovered=False))
    next(iter(good))
    (bad,) = engine.submit(GenerationRequest(documents[:1], [5] * 900, 900))
    with pytest.raises(BudgetError, match="raise kv_budget"):
        bad.result()
    assert len(good.result().token_ids) == 40
    with pytest.raises(BudgetError):
        engine.run([good.request, bad.request])
    assert is_idle(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"n": 0}, "n must be"),
     ({"reserve": 2}, "reserve"), ({"stop": [""]}, "stop string"),
     ({"documents": ["nope"]}, "unknown document"), ({"question": []}, "question is empty"),
     ({"question": [5] * 3000}, "context of 2048")],
)  # fmt: skip
def test_bad_requests_are_refused_before_anything_runs(setup, options, message):
    engine, documents, _, _ = setup
    with pytest.raises(RedknotError, match=message):
        engine.submit(GenerationRequest(**{"documents": documents, "question": [5], **options}))
    assert engine.session_stats()["waiting"] == 0


def test_cancelled_samples_leave_the_others(setup):
    engine, documents, _, _ = setup
    sessions = engine.submit(GenerationRequest(documents, [5, 6], 8, n=3, share_recovered=False))
    sessions[0].cancel()
    sessions[2].cancel()
    assert len(sessions[1].result().token_ids) == 8
    with pytest.raises(InputError, match="was cancelled"):
        sessions[0].result()
    assert is_idle(engine)
