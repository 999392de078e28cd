"""`redknot generate`: the main job on a checkpoint and text files of the user's own."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redknot.cli.output import bytes_text, print_json, progress_bar, quiet_libraries, table
from redknot.errors import InputError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a question over text files, and say what reuse saved",
        description="Cache each document once, answer the question over all of them, and compare "
        "time, memory and FLOPs with dense prefill of the same tokens in the same run.",
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--head-map", help="head map JSON; default: every head global (exact)")
    parser.add_argument("--doc", action="append", default=[], help="text file (repeat for more)")
    parser.add_argument("--question", required=True)
    parser.add_argument("--prefix", help="system prompt; default: the model's BOS alone")
    parser.add_argument("--policy", choices=sorted(_policies()), default="redknot")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="runs per median (default 3)")
    parser.add_argument("--no-compare", action="store_true", help="leave the dense runs out")
    parser.add_argument("--kv-budget", help="bytes of the page pool, such as 8GiB")
    parser.add_argument(
        "--store",
        action="append",
        default=[],
        metavar="URL",
        help="where cached documents are found and kept: mem:?capacity=4GiB, lmdb:///path, "
        "redis://host:port/db (repeat for more, nearest first); default: nowhere",
    )
    parser.add_argument("--page-size", type=int, default=64, help="tokens per page (default 64)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--alone", action="store_true", help="cache documents without the prefix")
    parser.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    parser.add_argument("--stop", action="append", default=[], help="stop string (repeat for more)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    sampling = parser.add_argument_group("sampling (default: greedy)")
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--seed", type=int)
    options = parser.add_argument_group("options of policies")
    for name, defaults in _options().items():
        of = ", ".join(f"{policy}: {default}" for policy, default in defaults.items())
        options.add_argument(f"--{name.replace('_', '-')}", type=_number, help=f"default of {of}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    if args.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {args.repeats}")
    texts = [_read_text(path) for path in args.doc]
    policy = _policy(args)
    quiet_libraries()
    from redknot.engine import Engine
    from redknot.eval.measure import compare_with_dense
    from redknot.heads import HeadMap
    from redknot.models import load_config, load_model, load_tokenizer
    from redknot.store import parse_url

    # Whatever is wrong with the small things is said before the weights are read.
    for url in args.store:
        parse_url(url)
    config = load_config(args.model)
    heads = HeadMap.from_json(args.head_map) if args.head_map else None
    if heads is not None:
        heads.check_model(config.num_hidden_layers, config.num_key_value_heads)
    tokenizer = load_tokenizer(args.model)
    engine = Engine(
        load_model(args.model, dtype=args.dtype, device=args.device),
        heads,
        policy=policy,
        prefix=args.prefix,
        tokenizer=tokenizer,
        kv_budget=args.kv_budget,
        page_size=args.page_size,
        chat=False if args.no_chat else None,
        behind_prefix=not args.alone,
        store=args.store or "mem:",
    )
    with engine:
        documents = []
        total = len(texts) * engine.decoder.shape.num_layers
        with progress_bar(total, "caching documents", "layer") as bar:
            for path, text in zip(args.doc, texts, strict=True):
                bar.set_postfix_str(Path(path).name)
                documents.append(engine.add(text, progress=bar.update))
        report = compare_with_dense(
            engine,
            documents,
            args.question,
            repeats=args.repeats,
            compare=not args.no_compare,
            max_new_tokens=args.max_new_tokens,
            stop=args.stop,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        engine.flush()
        tiers = [{"tier": tier.name, **asdict(tier.counts)} for tier in engine.store.tiers]
    names = dict(zip(documents, args.doc, strict=True))
    if args.json:
        print_json({**report.to_dict(names), "store": tiers})
    else:
        print(_text(report, names, tiers))
    return 0


def _policies() -> dict[str, Any]:
    from redknot.recovery import POLICIES

    return POLICIES


def _options() -> dict[str, dict[str, Any]]:
    """Names of all policies' options, and their default by policy."""
    options: dict[str, dict[str, Any]] = {}
    for policy, cls in _policies().items():
        for field in dataclasses.fields(cls):
            options.setdefault(field.name, {})[policy] = field.default
    return options


def _number(text: str) -> int | float | str:
    """What an option's text says; the policy knows whether that makes sense."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _policy(args: argparse.Namespace) -> Any:
    given = {name: getattr(args, name) for name in _options()}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        owners = _options()[name]
        if args.policy not in owners:
            raise InputError(
                f"--{name.replace('_', '-')} is an option of --policy {' or '.join(owners)}, "
                f"not of {args.policy}"
            )
    try:
        return _policies()[args.policy](**given)
    except TypeError as error:  # a word where a number belongs
        raise InputError(f"--policy {args.policy}: {error}") from None


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path}: the document is empty")
    return text


def _text(report: Any, names: dict[str, str], tiers: list[dict[str, Any]]) -> str:
    answer = report.answer
    ledger = answer.ledger
    rows = [
        [
            run.name,
            f"{1e3 * run.ttft_seconds:.1f} ms",
            f"{report.ttft_ratio(run):.2f}x",
            f"{1e3 * run.seconds_per_token:.2f} ms",
            bytes_text(run.peak_bytes) if run.peak_bytes else "?",
        ]
        for run in report.runs
    ]
    explanation = answer.explain()
    lines = [
        answer.text.strip() or "(no text)",
        "",
        table(["run (medians)", "TTFT", "ours vs it", "per token", "peak memory"], rows),
        "",
        f"prompt {len(answer.prompt_token_ids)} tokens, answer {len(answer.token_ids)} tokens "
        f"({answer.finish_reason})",
        f"FLOPs: {ledger.flops:.3g} of {ledger.dense_flops:.3g} dense; saved {ledger.saved:.1%} "
        f"({ledger.saved_over_prefix_cache:.1%} against dense with a cached prefix)",
        "  " + ", ".join(f"{name} {value:.3g}" for name, value in ledger.parts.items()),
        f"offline: {ledger.offline_flops:.3g} FLOPs, {report.offline_seconds:.2f} s once; "
        f"paid back after {_reuses(ledger.break_even_reuses)}",
        f"KV held: {bytes_text(explanation.kv_bytes)} ({bytes_text(explanation.private_kv_bytes)} "
        "by this session alone)" + _dense_kv(report.dense_kv_bytes),
        "",
        *(_tier_text(tier) for tier in tiers),
        *([f"first request: TTFT {1e3 * report.first_ttft_seconds:.1f} ms", ""] if tiers else []),
        *(f"{names[d.id]}\n  {d}" for d in explanation.documents),
    ]
    return "\n".join(lines)


def _tier_text(tier: dict[str, Any]) -> str:
    failures = ", ".join(f"{count} {what}" for what, count in tier["failures"].items())
    return (
        f"store {tier['tier']}: {tier['hits']} hits ({bytes_text(tier['bytes_read'])} read), "
        f"{tier['misses']} misses, {tier['segments_written']} segments written"
        + (f"; failures: {failures}" if failures else "")
    )


def _dense_kv(count: int | None) -> str:
    return "" if count is None else f"; dense held {bytes_text(count)}"


def _reuses(count: float) -> str:
    if count == float("inf"):
        return "no number of reuses (nothing is saved)"
    return f"{count:.1f} reuses"
