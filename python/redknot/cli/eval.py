"""`redknot eval`: does the answer survive, and what is saved: policies compared on one model."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from redknot.cli.eval_text import report_text
from redknot.cli.output import check_outputs, progress_bar, quiet_libraries
from redknot.errors import InputError

__all__ = ["add_parser", "run"]

_QUICK_LENGTHS, _QUICK_QUESTIONS = "1000", 60
_LENGTHS, _QUESTIONS = "1000,2048,4096", 1000
_TEXT_TEMPLATE = "\n\nQuestion: {input}\nAnswer:"


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "eval",
        help="quality, FLOPs, memory and time of every policy, with paired intervals against dense",
        description="Answer the same questions over the same documents under every policy, in one "
        "run, and compare each with dense. Questions of the demo models' tasks, or of JSONL files "
        "in LongBench's or RULER's format for any checkpoint. An interrupted run prints what it "
        "has, and the same command continues it.",
    )
    parser.add_argument("model", nargs="?", help="checkpoint (default: the embedded demo model)")
    parser.add_argument(
        "--tasks", help="comma-separated: tasks of the demo models (default: all), or JSONL files"
    )
    parser.add_argument("--lengths", help=f"tokens of demo prompts (default {_LENGTHS})")
    parser.add_argument(
        "--policies", help="comma-separated, with options as name:option=value (default: all)"
    )
    parser.add_argument("--heads", help="head map JSON (default: head_map.json beside the model)")
    parser.add_argument("-n", type=int, help=f"questions per cell (default {_QUESTIONS})")
    parser.add_argument("--seed", type=int, default=0, help="which prompts (default 0)")
    parser.add_argument("--quick", action="store_true", help="one length, few questions: a minute")
    parser.add_argument("--controls", action="store_true", help="add what must fail: random rows, "
                        "wrong heads, no global heads")  # fmt: skip
    parser.add_argument("--ffn-signals", action="store_true", help="instead of policies: the "
                        "sparse FFN's signals at several shares of the rows")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the rows; records go to FILE.partial")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against FLOPs and time")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--page-size", type=int, default=16, help="tokens per page (default 16)")
    engine.add_argument("--kv-budget", default="1GiB", help="of each page pool (default 1GiB)")
    engine.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    engine.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    engine.add_argument("--threads", type=int, help="default 1 for the embedded model, else all")
    engine.add_argument("--alone", action="store_true", help="cache documents without the prefix")
    text = parser.add_argument_group("JSONL files")
    text.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default 32)")
    text.add_argument(
        "--question-template", default=_TEXT_TEMPLATE, help="with {input} (default: %(default)r)"
    )
    text.add_argument(
        "--document-separator", help="regular expression that a document begins with "
        "(default: 'Passage 1:', 'Document 1:' or a blank line)"
    )  # fmt: skip
    text.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    n, lengths = _sizes(args)
    check_outputs(args.json, args.plot)
    quiet_libraries()
    import torch

    from redknot.eval.candidates import build_candidates
    from redknot.eval.evaluation import RecordFile, evaluate
    from redknot.eval.table import Gate, make_rows

    if args.threads or not args.model:
        torch.set_num_threads(args.threads or 1)
    setting = _Setting(args)
    groups = setting.groups(n, lengths)
    policies = setting.policies()
    main = build_candidates(setting.engine_for, setting.heads, policies, controls=args.controls)
    candidates = {group.name: setting.with_signals(main, group) for group in groups}
    every = list({c.label: c for found in candidates.values() for c in found}.values())
    settings = setting.describe(groups, every)
    partial = Path(f"{args.json}.partial") if args.json else None
    records = RecordFile(partial, settings)
    complete, started = True, time.process_time()
    progress = _Progress(groups)
    try:
        evaluate(
            groups,
            lambda group: candidates[group.name],
            records,
            max_context=main[0].engine.decoder.max_context,
            on_prompt=progress,
        )
    except KeyboardInterrupt:
        complete = False
    finally:
        progress.close()
    rows = make_rows(records.all(), every, gate=Gate(min_questions=setting.gate_n), seed=args.seed)
    if not rows:
        raise InputError("no question was answered: every prompt is longer than the context")
    report = _report(args, settings, records.all(), rows, complete, time.process_time() - started)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
        if complete:
            records.finish()
    print(report_text(report, complete))
    if args.plot:
        from redknot.eval.pareto import plot_pareto

        plot_pareto(rows, args.plot, f"redknot eval {setting.name}, n = {n} per cell at most")
    return 0 if complete else 130


def _sizes(args: argparse.Namespace) -> tuple[int, tuple[int, ...]]:
    n = args.n if args.n is not None else _QUICK_QUESTIONS if args.quick else _QUESTIONS
    if n < 1:
        raise InputError(f"-n must be at least 1, got {n}")
    if args.seed < 0:
        raise InputError(f"--seed must be >= 0, got {args.seed}")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads must be at least 1, got {args.threads}")
    text = args.lengths or (_QUICK_LENGTHS if args.quick else _LENGTHS)
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--lengths must be numbers such as 1000,2048, got {text!r}") from None
    if min(lengths) < 128:
        raise InputError(f"--lengths must be at least 128, got {min(lengths)}")
    return n, tuple(dict.fromkeys(lengths))


class _Setting:
    """Model, head map, tasks and policies that the arguments name."""

    def __init__(self, args: argparse.Namespace) -> None:
        from redknot.eval.demo import DEMO_MODEL
        from redknot.eval.tasks import TASKS
        from redknot.heads import HeadMap
        from redknot.models import load_config, load_model, load_tokenizer

        self.args = args
        self.path = args.model or str(DEMO_MODEL)
        self.name = args.model or "the embedded model"
        names = args.tasks.split(",") if args.tasks else list(TASKS)
        self.demo_tasks = tuple(name for name in names if name in TASKS)
        files = [name for name in names if name not in TASKS]
        for name in files:
            if not name.endswith((".jsonl", ".json")):
                known = ", ".join(TASKS)
                raise InputError(f"unknown task {name!r}; there are {known}, and JSONL files")
        # Whatever is wrong with the small files is said before the weights are read.
        self.files = [self._read(name) for name in files]
        config = load_config(self.path)
        self.heads = HeadMap.from_json(self._heads_path())
        self.heads.check_model(config.num_hidden_layers, config.num_key_value_heads)
        self.tokenizer = load_tokenizer(self.path)
        if self.demo_tasks:
            self._check_language(config.max_position_embeddings)
        self.gate_n = 1000 if self.demo_tasks else 200
        dtype = args.dtype or ("auto" if args.model else "float32")
        self.model = load_model(self.path, dtype=dtype, device=args.device)

    def _read(self, name: str) -> Any:
        from redknot.eval.text_tasks import read_text_task

        return read_text_task(
            name,
            question_template=self.args.question_template,
            separator=self.args.document_separator,
            limit=self.args.n,
        )

    def _heads_path(self) -> Path:
        if self.args.heads:
            return Path(self.args.heads)
        beside = Path(self.path) / "head_map.json"
        if not beside.exists():
            raise InputError(
                f"{self.path} has no head_map.json; measure one with 'redknot profile' and name it "
                "with --heads"
            )
        return beside

    def _check_language(self, max_context: int) -> None:
        from redknot.eval import arrivals

        words = " ".join(arrivals.VOCABULARY[len(arrivals.SPECIALS) :])
        if self.tokenizer(words, add_special_tokens=False).input_ids != arrivals.encode(words):
            raise InputError(
                f"{self.name} does not speak the demo models' language, in which "
                f"{', '.join(self.demo_tasks)} are asked; give JSONL files with --tasks"
            )
        lengths = _sizes(self.args)[1]
        if max(lengths) + 16 > max_context:
            raise InputError(
                f"--lengths {max(lengths)} is more than the model's context of {max_context}"
            )

    def groups(self, n: int, lengths: tuple[int, ...]) -> list[Any]:
        from redknot.eval.evaluation import demo_group, text_group

        args = self.args
        found = [text_group(task, n, args.max_new_tokens, ("\n",)) for task in self.files]
        if self.demo_tasks:
            found += [demo_group(length, self.demo_tasks, n, args.seed) for length in lengths]
        return found

    def policies(self) -> list[tuple[str, Any]]:
        from redknot.eval.candidates import DEFAULT_POLICIES, parse_policy

        if self.args.ffn_signals and not self.args.policies:
            return [("redknot", parse_policy("redknot"))]
        labels = self.args.policies.split(",") if self.args.policies else DEFAULT_POLICIES
        return [(label.strip(), parse_policy(label)) for label in labels]

    def with_signals(self, candidates: list[Any], group: Any) -> list[Any]:
        """Candidates of a group; shares of the rows depend on its length."""
        from redknot.eval.candidates import Candidate, ffn_signal_policies

        if not self.args.ffn_signals:
            return candidates
        if group.length is None:
            raise InputError("--ffn-signals needs a task of the demo models")
        engine = candidates[0].engine
        signals = [Candidate(label, p, engine) for label, p in ffn_signal_policies(group.length)]
        return candidates + signals

    def engine_for(self, heads: Any) -> Any:
        from redknot.engine import Engine

        # Documents carry their own separators: the prompt is the file's text.
        return Engine(
            self.model,
            heads,
            tokenizer=self.tokenizer,
            kv_budget=self.args.kv_budget,
            page_size=self.args.page_size,
            separator="",
            chat=False if self.args.no_chat else None,
            behind_prefix=not self.args.alone,
        )

    def describe(self, groups: list[Any], candidates: list[Any]) -> dict[str, Any]:
        """Everything that the records depend on."""
        from redknot.store import model_fingerprint

        args = self.args
        return {
            "model": self.name,
            "model_fingerprint": model_fingerprint(
                self.model.config.to_dict(), self.model.state_dict()
            ),
            "head_map": {
                "global_fraction": self.heads.global_fraction,
                "classes": [list(row) for row in self.heads.classes],
                "windows": self.heads.windows.tolist(),
                "sinks": self.heads.sinks.tolist(),
            },
            "groups": [f"{g.name}: {', '.join(g.tasks)}, n {g.questions_per_task}" for g in groups],
            "policies": {c.label: repr(c.policy) for c in candidates},
            "seed": args.seed,
            "page_size": args.page_size,
            "dtype": str(self.model.dtype),
            "device": args.device,
            "documents_behind_prefix": not args.alone,
            "max_new_tokens": args.max_new_tokens if self.files else None,
            "question_template": args.question_template if self.files else None,
        }


class _Progress:
    """One bar over all questions; the first prompt of each group says how long it will take."""

    def __init__(self, groups: list[Any]) -> None:
        self._bar = progress_bar(sum(group.total for group in groups), "questions", "q")
        self._done: dict[str, int] = {}
        self._started = time.perf_counter()

    def __call__(self, group: Any, number: int, answered: int) -> None:
        before = self._done.get(group.name, 0)
        if group.name not in self._done:
            seconds = time.perf_counter() - self._started
            expected = seconds * group.total / max(answered, 1) / 60
            print(
                f"{group.name}: first prompt {seconds:.1f} s for {answered} questions under every "
                f"policy, so about {expected:.1f} minutes for {group.total}",
                file=sys.stderr,
            )
        self._done[group.name] = answered
        self._bar.set_postfix_str(group.name)
        self._bar.update(answered - before)
        if answered >= group.total:
            self._started = time.perf_counter()

    def close(self) -> None:
        self._bar.close()


def _report(
    args: argparse.Namespace,
    settings: dict[str, Any],
    records: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    complete: bool,
    cpu_seconds: float,
) -> dict[str, Any]:
    from redknot.eval.origin import origin
    from redknot.eval.table import shared_agreement

    command = shlex.join(["redknot", *sys.argv[1:]])
    return {
        **origin(command),
        "settings": settings,
        "complete": complete,
        "cpu_seconds": round(cpu_seconds, 1),
        "shared_equals_alone": shared_agreement(records),
        "rows": rows,
    }
