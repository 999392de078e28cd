"""`redknot profile`: measure which heads of a model need the whole context, and write its map."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from redknot.cli.output import PhaseBars, check_outputs, print_json, quiet_libraries, table
from redknot.errors import InputError

__all__ = ["add_parser", "run"]

_CRITERIA = ("global_fraction", "max_kl", "max_loss_points", "kv_bytes", "flops")
_DEFAULT_FRACTION = 0.15


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "profile",
        help="find a model's global heads with texts of your own",
        description="Measure how far the answers move when each KV head alone sees only sink + "
        "window and keeps the K and V of documents cached alone; write the head map, and beside it "
        "the whole profile, from which --from makes other maps without measuring again.",
    )
    parser.add_argument("model", nargs="?", help="checkpoint folder or hub id")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="plain text, or .jsonl with documents, question and answer per line (repeat for more)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json", help="the head map")
    parser.add_argument("--profile", metavar="FILE", help="default: FILE.profile.json beside it")
    parser.add_argument("--from", dest="source", metavar="PROFILE", help="measure nothing anew")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")

    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--method",
        choices=("grouped", "alone", "signals"),
        default="grouped",
        help="causal sensitivity by group testing (default), of each head alone, or none",
    )
    measure.add_argument(
        "--context", type=int, default=4096, help="tokens of a plain text's stretch"
    )
    measure.add_argument("--document-tokens", type=int, help="default: a quarter, at most 512")
    measure.add_argument("--answer-tokens", type=int, default=64, help="predicted (default 64)")
    measure.add_argument("--max-samples", type=int, default=8, help="default 8; 0: all")
    measure.add_argument("--window", type=int, help="of a local head; default: within an eighth")
    measure.add_argument("--sink", type=int, default=4, help="of a local head (default 4)")
    measure.add_argument("--coverage", type=float, default=0.95, help="of its mass (default .95)")
    measure.add_argument(
        "--min-kl", type=float, default=0.002, help="no effect below (default .002)"
    )
    measure.add_argument("--no-maps", action="store_true", help="do not run whole maps")
    measure.add_argument("--prefix", help="system prompt; default: the model's BOS alone")
    measure.add_argument("--no-chat", action="store_true", help="do not use the chat template")
    measure.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    measure.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    measure.add_argument("--threads", type=int, help="default: all")

    classify = parser.add_argument_group(
        f"the map (default: --global-fraction {_DEFAULT_FRACTION})"
    )
    one = classify.add_mutually_exclusive_group()
    one.add_argument("--global-fraction", type=float, help="at most this share of all KV heads")
    one.add_argument("--max-kl", type=float, help="as few heads as keep the answers' KL under this")
    one.add_argument("--max-loss-points", type=float, help="the same by points of token accuracy")
    one.add_argument("--kv-bytes", help="as many heads as fit, such as 2GiB at --at tokens")
    one.add_argument("--flops", type=float, help="as many as a prefill of --at tokens can compute")
    classify.add_argument("--at", type=int, help="tokens of these budgets (default: as calibrated)")
    classify.add_argument("--signal", choices=("kl", "local_shift", "prefix_shift", "edge_mass"))
    classify.add_argument("--layer-floor", type=int, default=0, help="global heads in every layer")
    classify.add_argument(
        "--retrieval-share",
        type=float,
        help="global heads with 90 %% of their mass in this share of the pages become retrieval",
    )
    classify.add_argument("--retrieval-top-p", type=float, default=0.9, help="default .9")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    from redknot.eval.profiling import HeadProfile
    from redknot.eval.profiling.files import write_atomically

    output = Path(args.output)
    check_outputs(output, args.profile)
    criteria = _criteria(args)
    if args.source:
        if args.model or args.text:
            raise InputError("--from measures nothing; leave MODEL and --text out")
        profile, profile_path = HeadProfile.from_json(args.source), Path(args.source)
    else:
        profile_path = Path(args.profile or output.with_suffix(".profile.json"))
        profile = _measure(args, profile_path)
        profile.to_json(profile_path)
    heads = profile.classify(
        **criteria,
        context=args.at,
        signal=args.signal,
        layer_floor=args.layer_floor,
        retrieval_share=args.retrieval_share,
        retrieval_top_p=args.retrieval_top_p,
    )
    write_atomically(output, json.dumps(heads.to_json(), indent=1) + "\n")
    report = _report(profile, heads, output, profile_path)
    if args.json:
        print_json(report)
    else:
        print(_text(report, heads))
    return 0


def _criteria(args: argparse.Namespace) -> dict[str, Any]:
    from redknot.engine.budget import parse_bytes

    given = {name: getattr(args, name) for name in _CRITERIA if getattr(args, name) is not None}
    if "kv_bytes" in given:
        given["kv_bytes"] = parse_bytes(given["kv_bytes"])
    return given or {"global_fraction": _DEFAULT_FRACTION}


def _measure(args: argparse.Namespace, profile_path: Path) -> Any:
    if not args.model or not args.text:
        raise InputError("MODEL and at least one --text FILE are needed (or --from PROFILE)")
    for name in ("threads", "window", "document_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    if args.max_samples < 0:
        raise InputError(f"--max-samples must be at least 0, got {args.max_samples}")
    if not 0 < args.coverage <= 1:
        raise InputError(f"--coverage must be in (0, 1], got {args.coverage}")
    from redknot.eval.profiling import profile_heads, read_texts
    from redknot.models import load_config, load_model, load_tokenizer

    texts = [text for path in args.text for text in read_texts(path)]
    quiet_libraries()
    load_config(args.model)
    tokenizer = load_tokenizer(args.model)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    bars = PhaseBars()
    try:
        return profile_heads(
            model,
            tokenizer,
            texts,
            method=args.method,
            context_tokens=args.context,
            document_tokens=args.document_tokens,
            answer_tokens=args.answer_tokens,
            max_samples=args.max_samples or None,
            window=args.window,
            sink=args.sink,
            coverage=args.coverage,
            min_kl=args.min_kl,
            run_maps=not args.no_maps,
            prefix=args.prefix,
            chat=False if args.no_chat else None,
            state=profile_path.with_suffix(".state"),
            resume=args.resume,
            progress=bars,
        )
    finally:
        bars.close()


def _report(profile: Any, heads: Any, output: Path, profile_path: Path) -> dict[str, Any]:
    import numpy as np

    score = profile.score()
    highest = [
        {"layer": int(layer), "head": int(head), "score": float(score[layer, head])}
        for layer, head in (divmod(int(i), score.shape[1]) for i in profile.ranking()[:16])
    ]
    metadata = heads.metadata
    return {
        "head_map": str(output),
        "profile": str(profile_path),
        "summary": heads.summary(),
        "calibration": profile.calibration,
        "measured_window": profile.window,
        "method": metadata["method"],
        "criterion": metadata["criterion"],
        "highest": highest,
        "heads_measured_alone": None
        if profile.measured_alone is None
        else int(np.sum(profile.measured_alone)),
        "whole_maps": [dict(rung.__dict__) for rung in profile.rungs],
        "stability": metadata.get("stability"),
    }


def _text(report: dict[str, Any], heads: Any) -> str:
    sizes = report["calibration"]
    lines = [
        f"{sizes['samples']} samples of about {sizes['context_tokens']:,} tokens, "
        f"{sizes['answer_tokens']} answer tokens; local means window {report['measured_window']}",
        "",
        "highest heads, by " + report["method"] + ":",
        "  " + "  ".join(f"{h['layer']}.{h['head']} {h['score']:.3g}" for h in report["highest"]),
    ]
    if report["whole_maps"]:
        dense = report["whole_maps"][-1]
        rows = [
            [
                f"{rung['num_global']}",
                f"{rung['kl']:.4g}",
                f"{rung['nll']:.4g}",
                f"{100 * rung['accuracy']:.1f}",
                f"{100 * (rung['accuracy'] - dense['accuracy']):+.1f}",
            ]
            for rung in report["whole_maps"]
        ]
        header = ["global heads", "KL to dense", "loss", "accuracy", "points"]
        lines += ["", "whole maps, answers teacher forced:", table(header, rows)]
    lines += ["", str(heads)]
    if report["stability"]:
        alike = report["stability"]
        lines.append(
            f"from either half of the samples: {alike['global_heads_in_common']:.0%} of the global "
            f"heads in common, {alike['heads_alike']:.0%} of all heads alike"
        )
    lines.append(f"wrote {report['head_map']} and {report['profile']}")
    return "\n".join(lines)
