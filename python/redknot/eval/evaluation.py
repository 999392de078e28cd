"""The evaluation: prompts of every task and length, answered by every candidate, into one table.

Records (one per prompt) are written as they come, so that an interrupted run continues where it
stopped, and what there is can be tabulated at any time.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redknot.errors import InputError
from redknot.eval.answering import Decoding, answer_prompt
from redknot.eval.candidates import Candidate
from redknot.eval.tasks import TAUGHT_TASKS, EvalPrompt, make_task_prompt
from redknot.eval.text_tasks import TextTask

__all__ = ["Group", "RecordFile", "demo_group", "evaluate", "text_group"]

Record = dict[str, Any]

# Measured requests per group, about: their time, FLOPs and bytes hardly differ between prompts.
_MEASURED_PROMPTS = 24
_QUESTIONS_OF_A_PROMPT = 10  # of one task, about
_DEMO_DECODING = Decoding(max_new_tokens=3, metric="exact_match", compared_tokens=1)
# A prompt that adds nothing to any task is no progress; so many in a row mean there is none.
_MOST_IDLE_PROMPTS = 100


@dataclass(frozen=True)
class Group:
    """Prompts whose costs are reported together.

    Attributes
    ----------
    name : str
        Unique among the groups of a run.
    tasks : tuple of str
        Tasks that are asked.
    questions_per_task : int
        At most so many questions of each task.
    prompts : callable
        Starts the stream of prompts anew, the same every time.
    length : int, optional
        As the table names the group; None: the mean of its prompts' tokens.
    timed_every : int
        One prompt in so many has a question measured.
    awaited : tuple of str
        Prompts are drawn until these tasks have their questions; empty: all. The others get what
        those prompts hold.
    """

    name: str
    tasks: tuple[str, ...]
    questions_per_task: int
    prompts: Callable[[], Iterable[EvalPrompt]]
    decoding: Decoding
    length: int | None = None
    timed_every: int = 1
    awaited: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """How many questions of the awaited tasks there are to be."""
        return self.questions_per_task * len(self.awaited or self.tasks)


def demo_group(length: int, tasks: Sequence[str], n: int, seed: int) -> Group:
    """Prompts of `length` tokens in the demo models' language.

    `n` questions of each task that the models were taught; of the others what the prompts hold.
    """

    def prompts() -> Iterator[EvalPrompt]:
        # A run of its own numbers for each seed: no two runs share a prompt.
        return (make_task_prompt(number, length) for number in itertools.count(seed * 1_000_000))

    awaited = tuple(task for task in tasks if task in TAUGHT_TASKS)
    return Group(
        f"length {length}",
        tuple(tasks),
        n,
        prompts,
        _DEMO_DECODING,
        length,
        timed_every=max(1, n // (_QUESTIONS_OF_A_PROMPT * _MEASURED_PROMPTS)),
        awaited=awaited,
    )


def text_group(task: TextTask, n: int, max_new_tokens: int, stop: tuple[str, ...]) -> Group:
    """Prompts of a file."""
    decoding = Decoding(max_new_tokens, task.metric, stop=stop)
    return Group(task.name, (task.name,), n, lambda: task.prompts, decoding)


class RecordFile:
    """Records of a run that may be interrupted; the first line says what run it is.

    Raises
    ------
    InputError
        When the file belongs to a run with other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self._records: dict[tuple[str, int], Record] = {}
        if path is None:
            return
        header = json.dumps({"settings": settings}, sort_keys=True)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(header + "\n")
            return
        first, *rest = path.read_text().splitlines() or [""]
        if first != header:
            raise InputError(
                f"{path} holds records of a run with other settings; finish that run with the same "
                "command, or delete the file"
            )
        for line in rest:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line of a run that was killed
            self._records[record["group"], record["number"]] = record
        path.write_text("\n".join([header, *map(json.dumps, self._records.values())]) + "\n")

    def get(self, group: str, number: int) -> Record | None:
        """Return the record of a prompt, if it was answered before."""
        return self._records.get((group, number))

    def add(self, record: Record) -> None:
        """Keep a record, on disk too."""
        self._records[record["group"], record["number"]] = record
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def all(self) -> list[Record]:
        """Every record so far."""
        return list(self._records.values())

    def finish(self) -> None:
        """Remove the file: its run is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def evaluate(
    groups: Sequence[Group],
    candidates_of: Callable[[Group], Sequence[Candidate]],
    records: RecordFile,
    *,
    max_context: int,
    on_prompt: Callable[[Group, int, int], None] = lambda group, number, answered: None,
) -> None:
    """Answer the prompts of all groups and add one record for each.

    Parameters
    ----------
    candidates_of : callable
        Candidates of a group; the first is dense.
    max_context : int
        Prompts of more tokens than this, answers included, are left out and counted.
    on_prompt : callable
        Called after each prompt with the group, the prompt's number, and how many questions of the
        awaited tasks have been answered.
    """
    for group in groups:
        candidates = candidates_of(group)
        awaited = group.awaited or group.tasks
        asked: Counter[str] = Counter()
        idle = 0
        for number, prompt in enumerate(group.prompts()):
            if all(asked[task] >= group.questions_per_task for task in awaited):
                break
            chosen = _choose(group, prompt, asked)
            idle = 0 if any(question.task in awaited for question in chosen) else idle + 1
            if idle > _MOST_IDLE_PROMPTS:
                break
            if not chosen:
                continue
            record = records.get(group.name, number)
            if record is None:
                part = EvalPrompt(prompt.documents, tuple(chosen))
                record = _answer(group, number, part, candidates, max_context)
                records.add(record)
            asked.update(question.task for question in chosen)
            on_prompt(group, number, sum(asked[task] for task in awaited))


def _choose(group: Group, prompt: EvalPrompt, asked: Counter[str]) -> list[Any]:
    """Questions of the group's tasks, no more of each than are still wanted."""
    found, coming = [], Counter(asked)
    for question in prompt.questions:
        if question.task in group.tasks and coming[question.task] < group.questions_per_task:
            coming[question.task] += 1
            found.append(question)
    return found


def _answer(
    group: Group,
    number: int,
    prompt: EvalPrompt,
    candidates: Sequence[Candidate],
    max_context: int,
) -> Record:
    head = {"group": group.name, "length": group.length, "number": number}
    engine = candidates[0].engine
    tokens = len(engine.format.prefix_ids)
    tokens += sum(len(engine.format.document_ids(text)) for text in prompt.documents)
    longest = max(len(engine.format.question_ids(q.text)) for q in prompt.questions)
    if tokens + longest + group.decoding.max_new_tokens > max_context:
        return {
            **head,
            "too_long": tokens + longest,
            "questions": [q.task for q in prompt.questions],
        }
    timed = None
    if number % group.timed_every == 0:
        timed = (number // group.timed_every) % len(prompt.questions)
    return {**head, **answer_prompt(candidates, prompt, group.decoding, timed)}
