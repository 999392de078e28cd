"""`redknot demo`: the main job on the embedded model, measured on held-out questions."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from redknot.cli.output import bytes_text, print_json, progress_bar, quiet_libraries, table
from redknot.errors import InputError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="dense, naive and redknot on the embedded model and held-out questions",
        description="Answer held-out questions over several documents with the embedded model "
        "under each policy, in one run on the same tokens.",
    )
    parser.add_argument("--questions", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts (default 0)")
    parser.add_argument("--context", type=int, default=1000, help="document tokens (default 1000)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of every run alike (default 1: the model is so small that more of them cost time)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    if args.questions < 1:
        raise InputError(f"--questions must be at least 1, got {args.questions}")
    if not 128 <= args.context <= 4096:
        raise InputError(f"--context must be between 128 and 4096, got {args.context}")
    if args.seed < 0:
        raise InputError(f"--seed must be >= 0, got {args.seed}")
    if args.threads < 1:
        raise InputError(f"--threads must be at least 1, got {args.threads}")
    import torch

    from redknot.eval.demo import run_demo

    torch.set_num_threads(args.threads)

    quiet_libraries()
    with progress_bar(args.questions, "questions", "q") as bar:
        figures, example = run_demo(
            args.questions,
            seed=args.seed,
            context_tokens=args.context,
            progress=lambda done: bar.update(done - bar.n),
        )
    if args.json:
        print_json(figures)
    else:
        print(_report(figures, example))
    return 0


def _report(figures: dict[str, Any], example: Any) -> str:
    rows = []
    for name, score in figures["policies"].items():
        low, high = score["exact_match_interval"]
        rows.append(
            [
                name,
                f"{score['exact_match']:.3f} [{low:.3f}, {high:.3f}]",
                " / ".join(f"{value:.3f}" for value in score["exact_match_by_kind"].values()),
                f"{score['token_agreement']:.3f}",
                f"{score['flops_saved']:.1%}",
                bytes_text(score["kv_bytes"]),
                f"{1e3 * score['ttft_seconds']:.1f} ms",
                f"{score['ttft_ratio']:.2f}x",
                f"{score['ttft_ratio_hugging_face']:.2f}x",
                f"{score['global_fraction']:.0%}",
            ]
        )
    header = [
        "policy",
        "exact match [95 %]",
        " / ".join(next(iter(figures["policies"].values()))["exact_match_by_kind"]),
        "agree",
        "FLOPs saved",
        "KV held",
        "TTFT",
        "vs dense",
        "vs HF",
        "global",
    ]
    lines = [
        f"{figures['n']} held-out questions behind documents of "
        f"{figures['prompt_tokens']} tokens in all, each prefilled and decoded on its own.",
        "",
        table(header, rows),
        "",
        "direct: the answer stands in one document; relative: it needs two, one of which was",
        "cached without having seen the other. TTFT: median; vs dense: through redknot's own",
        "kernels; vs HF: Hugging Face's dense prefill with its SDPA attention "
        f"({1e3 * figures['hugging_face_ttft_seconds']:.1f} ms).",
        "",
        _show_example(example),
    ]
    return "\n".join(lines)


def _show_example(example: Any) -> str:
    question = example.question
    lines = [
        "One question in full",
        "====================",
        "The documents that hold the evidence:",
    ]
    for index in question.documents:
        lines.append(f"  document {index + 1} of {len(example.prompt.documents)}:")
        lines.append(textwrap.indent(example.prompt.documents[index].strip(), "    "))
    lines.append(f"Question: {question.text}    (right answer: {question.answer})")
    for name, answer in example.answers.items():
        verdict = "right" if answer.text.split()[:1] == [question.answer] else "wrong"
        lines.append(f"  {name:8} {answer.text.strip():10} {verdict}")
    lines += ["", "explain() of the redknot answer:"]
    redknot = example.answers.get("redknot") or next(reversed(example.answers.values()))
    return "\n".join(lines) + "\n" + str(redknot.explain())
