"""`redknot inspect`: what a head map would save on a model, told before anything is computed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redknot.cli.output import bytes_text, print_json, table
from redknot.errors import InputError

if TYPE_CHECKING:
    from redknot.heads import HeadMap
    from redknot.recovery import ModelShape

__all__ = ["add_parser", "run"]

_KEEP_HELP = (
    "share of the moved tokens whose FFN runs in sparse layers; known only after a run "
    "(default 1: dense FFN)"
)


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "inspect",
        help="what a head map would save in bytes and FLOPs",
        description="Print a head map, layers by heads, and count the bytes of a session and the "
        "FLOPs of a prefill over cached documents; no weights are read.",
    )
    parser.add_argument("map", nargs="?", metavar="HEADS.json", help="head map")
    parser.add_argument("--head-map", metavar="HEADS.json", help="the same, by name")
    parser.add_argument(
        "--model-config",
        help="checkpoint folder or hub id; maps of `redknot profile` know their model's sizes",
    )
    parser.add_argument("--context", type=int, default=32768, help="of a session (default 32768)")
    parser.add_argument("--question-tokens", type=int, default=64, help="of those (default 64)")
    parser.add_argument("--page-size", type=int, default=64, help="tokens per page (default 64)")
    parser.add_argument("--ffn-keep", type=float, default=1.0, help=_KEEP_HELP)
    parser.add_argument(
        "--dense-until", type=int, default=0, help="first layer whose FFN is sparse (default 0)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the map and the bytes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    _check(args)
    from redknot.heads import HeadMap

    heads = HeadMap.from_json(args.map or args.head_map)
    model = _model(args, heads)
    report: dict[str, Any] = {
        "head_map": heads.summary(),
        "context": args.context,
        "page_size": args.page_size,
    }
    if model is not None:
        report["model"] = model.summary()
        report["bytes"] = [
            _bytes_at(context, heads, model, args.page_size) for context in _contexts(args.context)
        ]
        report["prefill_flops"] = _flops(args, heads, model)
    if args.plot:
        from redknot.cli.inspect_plot import plot

        plot(args.plot, heads, report.get("bytes"))
    if args.json:
        print_json(report)
    else:
        print(_text(report, heads))
    return 0


@dataclass(frozen=True)
class _Model:
    """What of a model bytes and FLOPs depend on."""

    shape: ModelShape
    sliding_windows: list[int | None]
    bytes_per_element: int
    known: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        return {
            **self.known,
            "bytes_per_element": self.bytes_per_element,
            "layers_with_sliding_window": sum(w is not None for w in self.sliding_windows),
        }


def _model(args: argparse.Namespace, heads: HeadMap) -> _Model | None:
    """Take sizes from the config, or from what `redknot profile` left in the map."""
    from redknot.recovery import ModelShape

    if args.model_config is not None:
        from redknot.cli.output import quiet_libraries
        from redknot.models import family_of, load_config, shape_of

        quiet_libraries()
        config = load_config(args.model_config)
        known = {
            "model_type": config.model_type,
            "max_context": config.max_position_embeddings,
        }
        sliding_windows = family_of(config).sliding_windows(config)
        model = _Model(shape_of(config), sliding_windows, _bytes_per_element(config), known)
    elif (facts := heads.metadata.get("model_shape")) is not None:
        try:
            element, sliding = facts.pop("bytes_per_element"), facts.pop("sliding_windows")
            model = _Model(ModelShape(**facts), sliding, element, {})
        except (AttributeError, KeyError, TypeError):
            raise InputError(
                "the map's model_shape is not as `redknot profile` writes it; give --model-config"
            ) from None
    else:
        return None
    heads.check_model(model.shape.num_layers, model.shape.num_kv_heads)
    return model


def _check(args: argparse.Namespace) -> None:
    if (args.map is None) == (args.head_map is None):
        raise InputError("give one head map: redknot inspect HEADS.json")
    for option, least in (("context", 1), ("question_tokens", 1), ("page_size", 1)):
        if getattr(args, option) < least:
            flag = option.replace("_", "-")
            raise InputError(f"--{flag} must be at least {least}, got {getattr(args, option)}")
    if args.question_tokens > args.context:
        raise InputError(
            f"--question-tokens ({args.question_tokens}) must not exceed --context ({args.context})"
        )
    if not 0 < args.ffn_keep <= 1:
        raise InputError(f"--ffn-keep must be in (0, 1], got {args.ffn_keep}")
    if args.dense_until < 0:
        raise InputError(f"--dense-until must be at least 0, got {args.dense_until}")


def _bytes_per_element(config: Any) -> int:
    """Bytes of the checkpoint's dtype; two where the config does not say."""
    dtype = getattr(config, "dtype", None)
    return getattr(dtype, "itemsize", None) or (4 if str(dtype).endswith("float32") else 2)


def _contexts(context: int) -> list[int]:
    """Return shorter contexts on the way to the asked one."""
    return sorted({max(1, context // divisor) for divisor in (16, 4, 1)})


def _bytes_at(context: int, heads: HeadMap, model: _Model, page_size: int) -> dict[str, float]:
    """Bytes of one session whose context nobody shares, and how many more fit for that."""
    from redknot.heads import HeadMap

    def held(head_map: HeadMap) -> int:
        return head_map.kv_bytes(
            context,
            head_dim=model.shape.head_dim,
            bytes_per_element=model.bytes_per_element,
            page_size=page_size,
            sliding_windows=model.sliding_windows,
        )

    full = held(HeadMap.all_global(heads.num_layers, heads.num_kv_heads))
    mapped = held(heads)
    return {
        "context": context,
        "full_kv_bytes": full,
        "head_map_kv_bytes": mapped,
        "saved": 1 - mapped / full,
        "session_ceiling": full / mapped,
    }


def _flops(args: argparse.Namespace, heads: HeadMap, model: _Model) -> dict[str, Any]:
    """FLOPs of a prefill over cached documents, RedKnot as published, against dense."""
    from redknot.eval.cost import dense_flops, published_prefill_flops

    num_tokens, question = args.context, args.question_tokens
    parts = published_prefill_flops(
        heads,
        model.shape,
        num_tokens,
        question,
        sliding_windows=model.sliding_windows,
        ffn_keep=args.ffn_keep,
        dense_until=args.dense_until,
    )
    dense = dense_flops(model.shape, num_tokens, model.sliding_windows)
    total = sum(parts.values())
    return {
        "dense": dense,
        "redknot": total,
        "parts": parts,
        "saved": 1 - total / dense,
        "assumptions": [
            f"{num_tokens - question} tokens of cached documents behind another prefix, "
            f"{question} tokens of question",
            "every document row lives in every layer (RedKnot as published): its K and V are "
            "computed in global heads, and kept as cached in local heads",
            f"the FFN runs for {args.ffn_keep:.0%} of the document tokens from layer "
            f"{args.dense_until} on"
            if args.ffn_keep < 1
            else "the FFN runs for every token (--ffn-keep counts a sparse one)",
            "logits of the last row alone; dense prefill has no cached prefix",
        ],
    }


def _text(report: dict[str, Any], heads: HeadMap) -> str:
    lines = [str(heads), ""]
    if "model" not in report:
        return "\n".join([*lines, "bytes and FLOPs depend on the model: give --model-config"])
    model, flops = report["model"], report["prefill_flops"]
    if model["layers_with_sliding_window"]:
        lines.append(
            f"{model['layers_with_sliding_window']} layers have a sliding window of the model's "
            "own; both columns respect it"
        )
    rows = [
        [
            f"{row['context']:,}",
            bytes_text(row["full_kv_bytes"]),
            bytes_text(row["head_map_kv_bytes"]),
            f"{row['saved']:.1%}",
            f"{row['session_ceiling']:.2f}x",
        ]
        for row in report["bytes"]
    ]
    header = ["context", "full KV", "head map", "saved", "session ceiling"]
    lines += [
        f"KV of one session, {model['bytes_per_element']} bytes per element, "
        f"pages of {report['page_size']} tokens:",
        table(header, rows),
        "The ceiling is how many more sessions fit when none shares a page.",
        "",
        f"prefill of {report['context']:,} tokens: {flops['dense'] / 1e12:.4g} TFLOP dense, "
        f"{flops['redknot'] / 1e12:.4g} TFLOP redknot ({flops['saved']:.1%} saved)",
        table(
            ["part", "TFLOP"],
            [[part, f"{count / 1e12:.4g}"] for part, count in flops["parts"].items()],
        ),
        "Assumed:",
        *(f"  - {line}" for line in flops["assumptions"]),
    ]
    return "\n".join(lines)
