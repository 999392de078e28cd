"""The arrivals generator: answers follow from the text, and the text is what the model reads."""

from __future__ import annotations

import re

import numpy as np
import pytest

from redknot.eval import arrivals

SEEDS = (0, 1, 200_000)
LENGTHS = (64, 256, 1000, 2048)

DIRECT = re.compile(r"^(\w+) (?:arrives|lands|docks|returns) (\d\d):00 \.$")
RELATIVE = re.compile(r"^(\w+) (?:follows|trails|shadows) (\w+) \+(\d)h \.$")
QUESTION = re.compile(r"^(?:When does|What time is|When will) (\w+) (?:arrive|due|dock) \?$")


# make_prompt(200_000, 64, 2): the head map and every published number rest on such prompts.
PINNED_DOCUMENTS = (
    "Note from Cadiz :\nOdin arrives 04:00 .\nZina docks 07:00 .\n",
    "Memo from Varna :\nErik trails Odin +2h .\n",
    "Note from Cadiz :\nFrida arrives 14:00 .\nDerek arrives 19:00 .\n",
    "Report from Varna :\nOmar follows Frida +3h .\n",
    "Memo from Ghent :\nOtto trails Zina +4h .\nZelda trails Derek +4h .\n",
)
PINNED_QUESTIONS = [("When will Frida dock ?", "14:00"), ("What time is Erik due ?", "06:00")]


class Reader:
    """Reads a prompt as a person would, and knows nothing of how it was made."""

    def __init__(self, documents: tuple[str, ...]) -> None:
        self.hours: dict[str, int] = {}
        self.evidence: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        self.subjects: list[str] = []
        for index, document in enumerate(documents):
            for line in document.splitlines():
                if match := DIRECT.match(line):
                    self._note(match[1], int(match[2]), (index,), "direct")
                elif match := RELATIVE.match(line):
                    # Fails with KeyError unless the target was read before.
                    assert self.kinds[match[2]] == "direct"
                    hour = (self.hours[match[2]] + int(match[3])) % 24
                    self._note(match[1], hour, (*self.evidence[match[2]], index), "relative")

    def _note(self, name: str, hour: int, evidence: tuple[int, ...], kind: str) -> None:
        self.subjects.append(name)
        self.hours[name], self.evidence[name], self.kinds[name] = hour, evidence, kind


@pytest.mark.parametrize("context_tokens", LENGTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_answers_follow_from_the_text(seed: int, context_tokens: int) -> None:
    prompt = arrivals.make_prompt(seed, context_tokens, num_questions=24)
    reader = Reader(prompt.documents)
    assert prompt.questions
    for question in prompt.questions:
        match = QUESTION.match(question.text)
        assert match is not None, question.text
        name = match[1]
        assert question.answer == f"{reader.hours[name]:02d}:00"
        assert question.kind == reader.kinds[name]
        assert question.documents == reader.evidence[name]
        if question.kind == "relative":
            earlier, later = question.documents
            assert earlier < later


@pytest.mark.parametrize("seed", SEEDS)
def test_every_name_is_the_subject_of_one_fact_and_of_one_question(seed: int) -> None:
    prompt = arrivals.make_prompt(seed, 1000, num_questions=40)
    subjects = Reader(prompt.documents).subjects
    assert len(subjects) == len(set(subjects))
    asked = [question.text.split()[-3] for question in prompt.questions]
    assert len(asked) == len(set(asked))
    assert set(asked) <= set(subjects)


def test_equal_seeds_give_equal_prompts_and_others_do_not() -> None:
    prompt = arrivals.make_prompt(7, 512, 8)
    assert prompt == arrivals.make_prompt(7, 512, 8)
    assert prompt != arrivals.make_prompt(8, 512, 8)


def test_the_stream_of_a_seed_never_changes() -> None:
    prompt = arrivals.make_prompt(200_000, 64, 2)
    assert prompt.documents == PINNED_DOCUMENTS
    assert [(q.text, q.answer) for q in prompt.questions] == PINNED_QUESTIONS


@pytest.mark.parametrize("context_tokens", LENGTHS)
def test_the_context_is_as_long_as_asked_for(context_tokens: int) -> None:
    for seed in range(20):
        prompt = arrivals.make_prompt(seed, context_tokens, 1)
        length = 1 + sum(len(document.split()) for document in prompt.documents)
        assert context_tokens - 20 < length <= context_tokens


def test_both_kinds_of_question_are_asked() -> None:
    prompts = [arrivals.make_prompt(seed, 1000, 24) for seed in range(5)]
    kinds = [question.kind for prompt in prompts for question in prompt.questions]
    assert len(kinds) == 5 * 24
    assert 0.5 < kinds.count("relative") / len(kinds) < 0.7


def test_the_tokenizer_agrees_with_the_ids_of_training() -> None:
    pytest.importorskip("transformers")
    tokenizer = arrivals.build_tokenizer()
    prompt = arrivals.make_prompt(3, 512, 6)
    for text in (*prompt.documents, *(question.text for question in prompt.questions)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == arrivals.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).split() == text.split()
    assert tokenizer(prompt.documents[0]).input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token == arrivals.BOS
    assert tokenizer.eos_token == arrivals.EOS
    for hour in arrivals.HOURS:
        assert len(tokenizer(hour, add_special_tokens=False).input_ids) == 1


def test_a_batch_holds_answered_questions_and_the_hours_of_relative_facts() -> None:
    batch = arrivals.make_batch(np.random.default_rng((7, 1)), 4, 256, 12)
    again = arrivals.make_batch(np.random.default_rng((7, 1)), 4, 256, 12)
    np.testing.assert_array_equal(batch.token_ids, again.token_ids)
    words = np.array(arrivals.VOCABULARY)[batch.token_ids]
    for row, roles, known in zip(words, batch.roles, batch.known_hours, strict=True):
        lines = " ".join(row).replace(" . ", " .\n").replace(" : ", " :\n").splitlines()
        reader = Reader(("\n".join(lines),))
        answers = np.flatnonzero(np.isin(roles, (arrivals.ROLE_DIRECT, arrivals.ROLE_RELATIVE)))
        assert len(answers)
        for i in answers:
            name = row[i - 3]  # "Yngve arrive ? 00:00"
            assert row[i - 1] == "?"
            assert row[i] == f"{reader.hours[name]:02d}:00"
            relative = roles[i] == arrivals.ROLE_RELATIVE
            assert relative == (reader.kinds[name] == "relative")
            assert list(row[i + 1 : i + 3]) == [".", arrivals.EOS]
            assert list(roles[i + 1 : i + 3]) == [arrivals.ROLE_END] * 2
        offsets = np.flatnonzero(known >= 0)
        assert set(offsets) == set(np.flatnonzero(np.isin(row, arrivals.OFFSETS)))
        for i in offsets:
            assert arrivals.VOCABULARY[known[i]] == f"{reader.hours[row[i - 3]]:02d}:00"
