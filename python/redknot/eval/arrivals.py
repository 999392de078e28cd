"""The *arrivals* task: short documents whose facts depend on each other, and questions about them.

A prompt is ``[BOS]``, several short documents and one question. Two kinds of fact occur:

* a **direct** fact, ``Ulla lands 21:00 .``, is complete in itself;
* a **relative** fact, ``Yngve follows Ulla +3h .``, points at a direct fact in an *earlier*
  document, and ``When does Yngve arrive ?`` wants ``00:00`` (hours are added modulo 24).

A model that has read the documents in order can know Yngve's hour at the token ``+3h``; a key/value
cache of the second document computed alone cannot. So reusing documents that were cached
independently keeps the direct facts and loses the relative ones, which is what the evaluation
measures. Between the facts stand filler sentences with a little structure of their own.

Everything is drawn from ``numpy.random.default_rng``, hence the same on every machine. The text is
word level: ``build_tokenizer()(text, add_special_tokens=False)`` gives the ids that training uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "[PAD]", "[BOS]", "[EOS]", "[UNK]"
SPECIALS = (PAD, BOS, EOS, UNK)

HOURS = tuple(f"{hour:02d}:00" for hour in range(24))
OFFSETS = ("+1h", "+2h", "+3h", "+4h")
ARRIVAL_VERBS = ("arrives", "lands", "docks", "returns")
FOLLOW_VERBS = ("follows", "trails", "shadows")
DOCUMENT_KINDS = ("Note", "Report", "Letter", "Memo")
# The name stands two tokens before the question mark in every form.
QUESTION_FORMS = ("When does {} arrive ?", "What time is {} due ?", "When will {} dock ?")
PLACES = tuple("Bergen Porto Turku Ghent Izmir Leith Gdansk Varna Malmo Cadiz Brest Haifa".split())
ADJECTIVES = tuple(
    "quiet rusty amber cold narrow bright wooden broken gentle heavy pale distant silver humid "
    "empty old".split()
)
NOUNS = tuple(
    "harbor crane ferry lantern bridge rope market tower anchor window garden engine barrel signal "
    "stair kettle".split()
)
FILLER_VERBS = tuple("guards hides warms faces meets holds mirrors crosses".split())
GLUE = tuple("the and from . , ? : When does arrive What time is due will dock".split())
NAMES = tuple(
    """
    Abel Agnes Aldo Alma Amir Anton Arno Bella Berta Bodil Boris Bram Brita Carlo Clara Cleo Cosmo
    Cyrus Dagny Dario Delia Derek Dimitri Dora Eamon Edda Elsa Emil Enzo Erik Faro Fatma Felix Fiona
    Flora Frida Gala Gianni Gideon Goran Greta Gustav Hanna Hedda Helga Hilda Hugo Idris Igor Ilya
    Ines Isak Ivo Jana Jasper Jonas Julia Karim Katya Kira Klaus Kofi Leif Lena Lola Luca Ludo Lumi
    Magnus Mara Maya Milo Mina Mirko Nadia Neda Nestor Niko Nils Nora Odin Olga Omar Oona Orla Oskar
    Otto Pablo Paula Pavel Petra Pia Piet Quinn Radek Ravi Renata Rhea Rosa Runa Selma Signe Sila
    Simon Soren Sven Tarek Tessa Thea Tilda Timo Tomas Ugo Ulla Umberto Una Urban Vera Viggo Vilma
    Viola Vito Walid Wanda Willa Wilma Wim Xander Xenia Yanis Yara Yelena Yngve Yusuf Yvonne Zack
    Zelda Zeno Zina Zita Zora
    """.split()
)


def _build_vocabulary() -> tuple[str, ...]:
    groups = (SPECIALS, GLUE, DOCUMENT_KINDS, PLACES, ARRIVAL_VERBS, FOLLOW_VERBS, OFFSETS, HOURS)
    words = [word for group in groups for word in group]
    words += [word for group in (ADJECTIVES, NOUNS, FILLER_VERBS, NAMES) for word in group]
    if len(set(words)) != len(words):
        raise ValueError("arrivals: a word occurs twice in the vocabulary")
    words += [f"[UNUSED{i}]" for i in range(-len(words) % 16)]  # GEMM-friendly vocabulary size
    return tuple(words)


VOCABULARY = _build_vocabulary()
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}

# How filler prefers its words: most sentences obey these, some do not (see filler_sentence).
_NOUN_OF_ADJECTIVE = (5, 12, 0, 9, 3, 15, 7, 10, 1, 14, 6, 2, 11, 4, 13, 8)
_VERB_OF_NOUN = (3, 0, 6, 1, 7, 4, 2, 5, 5, 2, 7, 0, 1, 6, 3, 4)
FILLER_TOKENS = 8
_OBEDIENCE = 0.9
HEADER_TOKENS = 4
_MIN_DOCUMENT_TOKENS = 12


# Token ids, roles, and by position the token ids of known hours.
TrainingRow: TypeAlias = "tuple[list[int], list[int], dict[int, int]]"


@dataclass(frozen=True)
class Question:
    """One question about a prompt's documents.

    Attributes
    ----------
    text
        The question, ending in `` ?``.
    answer
        The hour that answers it: one token such as ``16:00``.
    kind
        ``"direct"`` or ``"relative"``.
    documents
        Indices of the documents that hold the evidence, ascending: one, or for a relative question
        the document of the target and the later document that points at it.
    """

    text: str
    answer: str
    kind: str
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Documents in prompt order, and questions that are asked one at a time behind all of them."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Batch:
    """Training sequences: documents followed by many answered questions, padded on the right.

    Attributes
    ----------
    token_ids
        int64 ``[batch, length]``.
    roles
        int8 ``[batch, length]``, what each token is: one of the ``ROLE_`` constants.
    known_hours
        int64 ``[batch, length]``: at the offset token of a relative fact the token id of the hour
        that this fact amounts to, -1 elsewhere.
    """

    token_ids: npt.NDArray[np.int64]
    roles: npt.NDArray[np.int8]
    known_hours: npt.NDArray[np.int64]


ROLE_NONE, ROLE_CONTEXT, ROLE_DIRECT, ROLE_RELATIVE, ROLE_END = range(5)


@dataclass(frozen=True)
class _Fact:
    """Who arrives when, as the generator knows it."""

    name: str
    hour: int
    document: int
    target: _Fact | None = None
    sentence: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "direct" if self.target is None else "relative"

    @property
    def documents(self) -> tuple[int, ...]:
        own = (self.document,)
        return own if self.target is None else (self.target.document, *own)


def encode(text: str) -> list[int]:
    """Return the token ids of ``text``, exactly as the tokenizer does without special tokens."""
    return [TOKEN_IDS[word] for word in text.split()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer; with special tokens it puts ``[BOS]`` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(TOKEN_IDS), unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, TOKEN_IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def make_prompt(
    seed: int, context_tokens: int, num_questions: int, relative_share: float = 0.45
) -> Prompt:
    """Make the prompt that belongs to ``seed``.

    Parameters
    ----------
    seed
        Equal seeds give equal prompts, on every machine.
    context_tokens
        Upper bound on ``[BOS]`` plus all documents; the prompt falls short by fewer than 20 tokens.
    num_questions
        How many questions to ask; fewer come back when there are not as many facts. About 60 % ask
        for relative facts.
    relative_share
        How many of the facts are relative, from the second document on.
    """
    return sample_prompt(np.random.default_rng(seed), context_tokens, num_questions, relative_share)


def sample_prompt(
    rng: np.random.Generator, context_tokens: int, num_questions: int, relative_share: float = 0.45
) -> Prompt:
    """Draw a prompt from ``rng``; arguments as in :func:`make_prompt`."""
    documents, facts = _draw_documents(rng, context_tokens, relative_share)
    questions = _draw_questions(rng, facts, num_questions)
    return Prompt(documents=documents, questions=questions)


def make_batch(
    rng: np.random.Generator, batch_size: int, context_tokens: int, num_questions: int
) -> Batch:
    """Draw training sequences ``[BOS] documents (question answer . [EOS])*`` from ``rng``.

    One sequence in ten lacks ``[BOS]``, so that a document alone is nothing unusual to the model.
    """
    rows = []
    for _ in range(batch_size):
        share = 0.6 if context_tokens <= 64 else 0.45
        documents, facts = _draw_documents(rng, context_tokens, share)
        tokens = [] if rng.random() < 0.1 else [TOKEN_IDS[BOS]]
        for document in documents:
            tokens += encode(document)
        hours = {TOKEN_IDS[fact.name]: TOKEN_IDS[HOURS[fact.hour]] for fact in facts}
        questions = _draw_questions(rng, facts, num_questions)
        rows.append(sequence(tokens, [(q.text, q.answer, q.kind) for q in questions], hours))
    return padded(rows)


def sequence(
    context: list[int], questions: Sequence[tuple[str, str, str]], hours: Mapping[int, int]
) -> TrainingRow:
    """Put answered questions behind a context: token ids, their roles, known hours by position.

    `questions` are (text, answer, kind); `hours` maps the token ids of persons to those of the
    hours that the relative facts about them amount to.
    """
    tokens = list(context)
    offsets = {TOKEN_IDS[offset] for offset in OFFSETS}
    # "Yngve follows Ulla +3h": the subject stands three tokens before the offset.
    known = {i: hours[tokens[i - 3]] for i, token in enumerate(tokens) if token in offsets}
    roles = [ROLE_CONTEXT] * len(tokens)
    roles[0] = ROLE_NONE
    for text, answer, kind in questions:
        asked = encode(text)
        tokens += [*asked, TOKEN_IDS[answer], TOKEN_IDS["."], TOKEN_IDS[EOS]]
        role = ROLE_DIRECT if kind == "direct" else ROLE_RELATIVE
        roles += [ROLE_NONE] * len(asked) + [role, ROLE_END, ROLE_END]
    return tokens, roles, known


def padded(rows: Sequence[TrainingRow]) -> Batch:
    """Make a batch of sequences, padded on the right."""
    length = max(len(tokens) for tokens, _, _ in rows)
    shape = (len(rows), length)
    token_ids = np.full(shape, TOKEN_IDS[PAD], dtype=np.int64)
    role_ids = np.full(shape, ROLE_NONE, dtype=np.int8)
    known_hours = np.full(shape, -1, dtype=np.int64)
    for row, (tokens, roles, known) in enumerate(rows):
        token_ids[row, : len(tokens)] = tokens
        role_ids[row, : len(roles)] = roles
        known_hours[row, list(known)] = list(known.values())
    return Batch(token_ids, role_ids, known_hours)


def _layout(context_tokens: int) -> tuple[int, int, int]:
    """Return (shortest document, longest document, tokens per fact); short prompts are dense."""
    if context_tokens <= 64:
        return 14, 20, 6
    if context_tokens <= 128:
        return 28, 44, 9
    if context_tokens <= 512:
        return 40, 72, 12
    return 40, 72, 14


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """Draw one of `words`."""
    return words[int(rng.integers(len(words)))]


def _draw_documents(
    rng: np.random.Generator, context_tokens: int, relative_share: float
) -> tuple[tuple[str, ...], list[_Fact]]:
    """Draw documents until the context is full; every name is the subject of at most one fact."""
    shortest, longest, tokens_per_fact = _layout(context_tokens)
    names = [NAMES[i] for i in rng.permutation(len(NAMES))]
    documents: list[str] = []
    facts: list[_Fact] = []
    targets: list[_Fact] = []  # the direct facts of the documents so far
    num_tokens = 1  # [BOS]
    while context_tokens - num_tokens >= _MIN_DOCUMENT_TOKENS:
        room = context_tokens - num_tokens
        length = min(int(rng.integers(shortest, longest)), room)
        if room - length < _MIN_DOCUMENT_TOKENS:
            length = room
        num_facts = min(max(1, (length - HEADER_TOKENS) // tokens_per_fact), len(names))
        new = [
            _draw_fact(rng, names.pop(), len(documents), targets, relative_share)
            for _ in range(num_facts)
        ]
        facts += new
        targets = targets + [fact for fact in new if fact.target is None]
        sentences = [fact.sentence for fact in new]
        left = length - HEADER_TOKENS - sum(len(sentence) for sentence in sentences)
        for _ in range(left // FILLER_TOKENS):
            sentences.append(filler_sentence(rng))
        lines = [f"{pick(rng, DOCUMENT_KINDS)} from {pick(rng, PLACES)} :"]
        lines += [" ".join(sentences[i]) for i in rng.permutation(len(sentences))]
        documents.append("\n".join(lines) + "\n")
        num_tokens += HEADER_TOKENS + sum(len(sentence) for sentence in sentences)
    return tuple(documents), facts


def _draw_fact(
    rng: np.random.Generator,
    name: str,
    document: int,
    targets: list[_Fact],
    relative_share: float,
) -> _Fact:
    if targets and rng.random() < relative_share:
        target = targets[int(rng.integers(len(targets)))]
        step = int(rng.integers(len(OFFSETS)))
        pointing = (name, pick(rng, FOLLOW_VERBS), target.name, OFFSETS[step], ".")
        return _Fact(name, (target.hour + step + 1) % 24, document, target, pointing)
    hour = int(rng.integers(24))
    stating = (name, pick(rng, ARRIVAL_VERBS), HOURS[hour], ".")
    return _Fact(name, hour, document, None, stating)


def filler_sentence(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw eight tokens of filler: half predictable, so that the model has something to learn."""
    if rng.random() < 0.3:
        first, second = pick(rng, NOUNS), pick(rng, NOUNS)
        return (first, "and", second, ",", first, "and", second, ".")
    one, two = int(rng.integers(16)), int(rng.integers(16))
    noun = _NOUN_OF_ADJECTIVE[one] if rng.random() < _OBEDIENCE else int(rng.integers(16))
    verb = _VERB_OF_NOUN[noun] if rng.random() < _OBEDIENCE else int(rng.integers(8))
    other = _NOUN_OF_ADJECTIVE[two] if rng.random() < _OBEDIENCE else int(rng.integers(16))
    head = ("the", ADJECTIVES[one], NOUNS[noun], FILLER_VERBS[verb])
    return (*head, "the", ADJECTIVES[two], NOUNS[other], ".")


def _draw_questions(
    rng: np.random.Generator, facts: list[_Fact], num_questions: int
) -> tuple[Question, ...]:
    """Ask about different facts, relative ones with probability 0.6 while both kinds remain."""
    shuffled = [facts[i] for i in rng.permutation(len(facts))]
    direct = [fact for fact in shuffled if fact.kind == "direct"]
    relative = [fact for fact in shuffled if fact.kind == "relative"]
    questions: list[Question] = []
    while len(questions) < num_questions and (direct or relative):
        pile = relative if relative and (not direct or rng.random() < 0.6) else direct
        fact = pile.pop()
        text = pick(rng, QUESTION_FORMS).format(fact.name)
        questions.append(Question(text, HOURS[fact.hour], fact.kind, fact.documents))
    return tuple(questions)
