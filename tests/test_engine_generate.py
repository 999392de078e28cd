"""Generation: from the same pages as the prefill, batched, streamed, sampled, stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, random_tokens, tiny_model

from redknot import Dense, Engine, HeadMap, InputError, RedKnot

pytestmark = pytest.mark.transformers


class WordTokenizer:
    """Token i is the word `wi`; enough of a tokenizer for the engine."""

    bos_token_id = 1
    chat_template = None

    def __call__(self, text, add_special_tokens=False):
        ids = [int(word[1:]) for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(f"w{token} " for token in token_ids)


@pytest.fixture(scope="module")
def setup():
    model = tiny_model("llama", 4, 2)
    heads = HeadMap([["local", "global"]] * 3, window=16, sink=4)
    engine = Engine(
        model, heads, tokenizer=WordTokenizer(), kv_budget="16MiB", page_size=16,
        poison_freed_pages=True,
    )  # fmt: skip
    rng = np.random.default_rng(11)
    documents = [engine.add(random_tokens(rng, n)) for n in (20, 33, 47, 9)]
    questions = [random_tokens(rng, n) for n in (3, 8, 1)]
    return engine, documents, questions


def test_a_batch_answers_like_its_requests_alone(setup):
    engine, documents, questions = setup
    contexts = [documents[:2], documents[::-1], []]
    batch = engine.generate(contexts, questions, max_new_tokens=20)
    alone = [
        engine.generate(c, q, max_new_tokens=20) for c, q in zip(contexts, questions, strict=True)
    ]
    assert [b.token_ids for b in batch] == [a.token_ids for a in alone]
    assert [b.text for b in batch] == [a.text for a in alone]


def test_the_first_token_is_the_prefills_argmax(setup):
    engine, documents, questions = setup
    prefill = engine.prefill(documents, questions[0])
    answer = engine.generate(documents, questions[0], max_new_tokens=1)
    assert answer.token_ids == [int(prefill.logits.argmax())]
    assert answer.ledger.flops == prefill.ledger.flops
    assert answer.prompt_token_ids == prefill.token_ids


def test_stream_yields_the_text(setup):
    engine, documents, questions = setup
    answer = engine.generate(documents, questions[1], max_new_tokens=12)
    assert "".join(engine.stream(documents, questions[1], max_new_tokens=12)) == answer.text


def test_a_stream_that_is_left_gives_its_pages_back(setup):
    engine, documents, questions = setup
    before = engine.kv_stats()
    stream = engine.stream(documents, questions[1], max_new_tokens=12)
    next(stream)
    assert engine.kv_stats()["num_sessions"] == 1
    stream.close()
    assert engine.kv_stats() == before


def test_stop_strings_end_before_the_match(setup):
    engine, documents, questions = setup
    whole = engine.generate(documents, questions[1], max_new_tokens=12)
    stop = " ".join(whole.text.split()[4:6])  # spans two tokens
    answer = engine.generate(documents, questions[1], max_new_tokens=12, stop=[stop])
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    pieces = list(engine.stream(documents, questions[1], max_new_tokens=12, stop=[stop]))
    assert "".join(pieces) == answer.text


def test_sampling_is_repeatable_and_follows_the_seed(setup):
    engine, documents, questions = setup
    options = {"max_new_tokens": 16, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first = engine.generate(documents, questions[0], seed=1, **options)
    again = engine.generate(documents, questions[0], seed=1, **options)
    other = engine.generate(documents, questions[0], seed=2, **options)
    assert first.token_ids == again.token_ids != other.token_ids


def test_top_k_one_is_greedy(setup):
    engine, documents, questions = setup
    greedy = engine.generate(documents, questions[0], max_new_tokens=8)
    sampled = engine.generate(documents, questions[0], max_new_tokens=8, temperature=2.0, top_k=1)
    assert sampled.token_ids == greedy.token_ids


def test_eos_ends_generation(setup):
    engine, documents, questions = setup
    whole = engine.generate(documents, questions[1], max_new_tokens=10)
    config = engine.decoder.model.generation_config
    try:
        config.eos_token_id = [whole.token_ids[3], VOCAB - 1]
        answer = engine.generate(documents, questions[1], max_new_tokens=10)
    finally:
        config.eos_token_id = None
    end = whole.token_ids.index(whole.token_ids[3]) + 1
    assert answer.finish_reason == "eos"
    assert answer.token_ids == whole.token_ids[:end]


def test_decoding_past_the_window_frees_pages_and_changes_nothing(setup):
    """Poisoned pages prove it: a session that never expires writes the same 200 tokens."""
    engine, documents, questions = setup
    model = engine.decoder.model
    answer = engine.generate(documents, questions[1], max_new_tokens=200)
    wide = Engine(
        model, HeadMap([["local", "global"]] * 3, window=16, sink=4), kv_budget="16MiB",
        page_size=512, poison_freed_pages=True,
    )  # fmt: skip
    # One page of 512 slots holds whole documents: next to nothing can expire.
    ids = [wide.add(engine.documents.token_ids(document)) for document in documents]
    assert wide.generate(ids, questions[1], max_new_tokens=200).token_ids == answer.token_ids

    session = engine._admission.admit(documents, np.array(questions[1]), RedKnot(), new_tokens=200)
    allocator, page_size = engine.pool.allocator, engine.pool.page_size
    try:
        for token in answer.token_ids[:-1]:
            engine._runner.decode([session.session], torch.tensor([token]), [session.rules])
        allocator.expire(session.session)
        indptr, refs = allocator.rows([session.session], 0)
        local, everything = refs[indptr[0] : indptr[1]], refs[indptr[1] : indptr[2]]
        length = allocator.session_length(session.session)
        assert everything[:, 2].sum() == length
        assert len(local) <= 2 + (16 // page_size + 2)
        window = local[local[:, 1] >= 4]  # pages without a sink position
        assert (window[:, 1] + window[:, 2] > length - 16).all()
        free = set(range(allocator.stats()["num_pages"])) - _referenced(engine, session.session)
        poisoned = [page for page in free if engine.pool.k_cache[page].isnan().all()]
        assert poisoned
    finally:
        allocator.release_session(session.session)


def _referenced(engine, session) -> set[int]:
    allocator = engine.pool.allocator
    return {int(p) for layer in range(3) for p in allocator.rows([session], layer)[1][:, 0]}


def test_sessions_share_the_pages_of_their_documents(setup):
    engine, documents, questions = setup
    alone = engine.kv_stats()["num_free_pages"]
    first = engine._admission.admit(documents, np.array(questions[0]), Dense(), new_tokens=0)
    dense_pages = alone - engine.kv_stats()["num_free_pages"]
    engine.pool.allocator.release_session(first.session)
    a = engine._admission.admit(documents, np.array(questions[0]), RedKnot(), new_tokens=0)
    b = engine._admission.admit(documents, np.array(questions[1]), RedKnot(), new_tokens=0)
    both = alone - engine.kv_stats()["num_free_pages"]
    shared = {*_referenced(engine, a.session)} & {*_referenced(engine, b.session)}
    engine.pool.allocator.release_session(a.session)
    engine.pool.allocator.release_session(b.session)
    assert shared  # local heads' windows over the last document are the same physical pages
    assert both < 2 * dense_pages
    assert engine.kv_stats()["num_free_pages"] == alone


def test_on_text_names_the_request(setup):
    engine, documents, questions = setup
    pieces = {0: "", 1: ""}

    def collect(number, text):
        pieces[number] += text

    answers = engine.generate(
        [documents, documents[:1]], questions[:2], max_new_tokens=6, on_text=collect
    )
    assert [pieces[0], pieces[1]] == [a.text for a in answers]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"),
     ({"top_p": 0.0}, "top_p"), ({"top_k": 0}, "top_k"), ({"stop": [""]}, "stop string")],
)  # fmt: skip
def test_bad_options_are_refused(setup, options, message):
    engine, documents, questions = setup
    with pytest.raises(InputError, match=message):
        engine.generate(documents, questions[0], **options)
