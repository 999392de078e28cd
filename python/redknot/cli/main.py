"""`redknot`: one command, one room of sub-commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from redknot.errors import RedknotError

__all__ = ["main"]

_BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """Parser of all sub-commands; each module adds its own."""
    from redknot.cli import bench, demo, doctor, eval, generate, inspect, profile, store

    parser = argparse.ArgumentParser(
        prog="redknot",
        description="Head-aware KV cache reuse for long-context inference.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, generate, inspect, profile, bench, eval, store, doctor):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; bad input is one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except RedknotError as error:
        print(f"redknot {args.command}: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
