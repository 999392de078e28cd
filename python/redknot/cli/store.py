"""`redknot store`: look into a store, check it, clean it, take segments along, compare policies."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redknot.cli.output import bytes_text, print_json, progress_bar, table
from redknot.errors import InputError
from redknot.store.manifest import Manifest

__all__ = ["add_parser", "run"]

_DAMAGED = 1


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "store",
        help="list, check, remove, export and import stored segments; compare eviction policies",
        description="Look after a store of cached documents: lmdb:///path or redis://host:port/db.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, *, url: bool = True) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
        if url:
            sub.add_argument("url", help="lmdb:///path or redis://host:port/db")
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    action("ls", "List the segments of a store.")
    get = action("get", "Show one segment.")
    get.add_argument("key", help="the key, or how it begins")
    remove = action("rm", "Remove segments.")
    remove.add_argument("key", nargs="*", help="keys, or how they begin")
    remove.add_argument("--all", action="store_true", help="all of them")
    remove.add_argument("--model", help="those of models whose fingerprint begins so")
    verify = action("verify", "Read everything and compare it with its checksums.")
    verify.add_argument("--repair", action="store_true", help="remove what is damaged or left over")
    for name, text in (
        ("export", "Write segments as safetensors files to a folder."),
        ("import", "Store the safetensors files of a folder."),
    ):
        sub = action(name, text)
        sub.add_argument("folder", help="a path, or file:///path")
        if name == "export":
            sub.add_argument("key", nargs="*", help="keys, or how they begin; default: all")
    action("stats", "Count segments and bytes, by region and by model.")
    simulate = action("simulate", "Compare eviction policies on traces of requests.", url=False)
    simulate.add_argument("--requests", type=int, default=4000, help="default 4000")
    simulate.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    if args.action == "simulate":
        return _simulate(args)
    from redknot.store.admin import StoreAdmin

    with StoreAdmin(args.url, create=args.action == "import") as admin:
        code: int = _ACTIONS[args.action](admin, args)
        return code


def _row(manifest: Manifest) -> dict[str, Any]:
    shape = manifest.shape
    return {
        "key": manifest.key,
        "model": manifest.fingerprint,
        "dtype": manifest.dtype,
        "tokens": shape.num_tokens,
        "bytes": manifest.num_bytes,
        "layers": shape.num_layers,
        "kv_heads": shape.num_kv_heads,
        "first_position": manifest.first_position,
        "hidden_layer": None if manifest.hidden_layer < 0 else manifest.hidden_layer,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.created)),
        "offline_seconds": manifest.offline_seconds,
    }


def _ls(admin: Any, args: argparse.Namespace) -> int:
    found = list(admin.segments())
    segments = [_row(item) for item in found if isinstance(item, Manifest)]
    troubles = [vars(item) for item in found if not isinstance(item, Manifest)]
    if args.json:
        print_json({"segments": segments, "troubles": troubles})
    else:
        rows = [
            [s["key"][:16], s["model"][:12], s["dtype"], str(s["tokens"]), bytes_text(s["bytes"]),
             s["created"]]
            for s in segments
        ]  # fmt: skip
        print(table(["segment", "model", "dtype", "tokens", "bytes", "created"], rows))
        for trouble in troubles:
            print(f"{trouble['key'][:16]}  {trouble['what']}")
    return _DAMAGED if troubles else 0


def _get(admin: Any, args: argparse.Namespace) -> int:
    manifest = admin.find(args.key)
    layout = manifest.layout
    shown = {
        **_row(manifest),
        "page_size": manifest.shape.page_size,
        "objects": dict(zip(layout.object_names, layout.object_sizes, strict=True)),
    }
    if args.json:
        print_json(shown)
    else:
        print("\n".join(f"{name:16} {value}" for name, value in shown.items()))
    return 0


def _rm(admin: Any, args: argparse.Namespace) -> int:
    if bool(args.key) + args.all + bool(args.model) != 1:
        raise InputError("store rm takes keys, --model or --all")
    if args.key:
        chosen = [admin.find(key) for key in args.key]
    else:
        found = [item for item in admin.segments() if isinstance(item, Manifest)]
        chosen = [item for item in found if item.fingerprint.startswith(args.model or "")]
    for manifest in chosen:
        admin.remove(manifest)
    _say(
        args, {"removed": [manifest.key for manifest in chosen]}, f"removed {len(chosen)} segments"
    )
    return 0


def _verify(admin: Any, args: argparse.Namespace) -> int:
    right, troubles = 0, []
    with progress_bar(0, "checking", "segment") as bar:
        for found in admin.verify(repair=args.repair):
            bar.update(1)
            if isinstance(found, Manifest):
                right += 1
            else:
                troubles.append(vars(found))
    lines = [f"{right} segments are right, {len(troubles)} troubles"]
    lines += [f"  {trouble['key'][:16]}  {trouble['what']}" for trouble in troubles]
    if troubles and not args.repair:
        lines.append("remove them with --repair")
    _say(args, {"right": right, "troubles": troubles}, "\n".join(lines))
    return _DAMAGED if troubles else 0


def _folder(text: str) -> Path:
    parts = urlsplit(text)
    if parts.scheme not in ("", "file") or parts.netloc:
        raise InputError(f"{text}: write a path, or file:///path")
    return Path(parts.path)


def _export(admin: Any, args: argparse.Namespace) -> int:
    folder = _folder(args.folder)
    keys = [admin.find(key) for key in args.key] or [
        item for item in admin.segments() if isinstance(item, Manifest)
    ]
    paths = [str(admin.export(manifest, folder)) for manifest in keys]
    _say(args, {"files": paths}, f"wrote {len(paths)} files to {folder}")
    return 0


def _import(admin: Any, args: argparse.Namespace) -> int:
    folder = _folder(args.folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder}: there are no .safetensors files")
    keys = [admin.import_file(path).key for path in paths]
    _say(args, {"segments": keys}, f"stored {len(keys)} segments")
    return 0


def _stats(admin: Any, args: argparse.Namespace) -> int:
    stats = admin.stats()
    lines = [
        f"{stats['segments']} segments, {stats['tokens']} tokens, {bytes_text(stats['bytes'])}",
        *(f"  {region:8} {bytes_text(size)}" for region, size in stats["bytes_by_region"].items()),
        *(f"  model {name[:12]}: {n} segments" for name, n in stats["segments_by_model"].items()),
    ]
    if stats["medium_bytes"] is not None:
        lines.append(f"the medium holds {bytes_text(stats['medium_bytes'])}")
    _say(args, stats, "\n".join(lines))
    return 0


def _simulate(args: argparse.Namespace) -> int:
    if args.requests < 1:
        raise InputError(f"--requests must be at least 1, got {args.requests}")
    from redknot.eval.store_policies import compare_policies

    with progress_bar(0, "replaying", "cache") as bar:
        rows = compare_policies(args.requests, seed=args.seed, progress=bar.update)
    shown = [
        [f"{row['trace']}, {row['capacity_share']:.0%}", str(row["unit"]), str(row["policy"]),
         f"{row['byte_hit_rate']:.1%}", f"{row['seconds_saved']:.1%}"]
        for row in rows
    ]  # fmt: skip
    header = ["trace, capacity", "unit", "policy", "bytes hit", "compute saved"]
    _say(args, {"rows": rows}, table(header, shown))
    return 0


def _say(args: argparse.Namespace, value: Any, text: str) -> None:
    if args.json:
        print_json(value)
    else:
        print(text)


_ACTIONS = {
    "ls": _ls,
    "get": _get,
    "rm": _rm,
    "verify": _verify,
    "export": _export,
    "import": _import,
    "stats": _stats,
}
