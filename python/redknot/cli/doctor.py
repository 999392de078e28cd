"""`redknot doctor`: what of redknot works on this machine, and what to do where it does not."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from redknot.cli.output import bytes_text, print_json
from redknot.errors import RedknotError

__all__ = ["add_parser", "run"]

_OPTIONAL = {
    "lmdb": "lmdb",
    "redis": "redis",
    "xxhash": "lmdb",
    "prometheus_client": "metrics",
    "matplotlib": "plot",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do next, if anything."""

    name: str
    state: str
    value: str
    advice: str = ""


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "doctor",
        help="what works on this machine, and what to do where it does not",
        description="Look at CPU, memory, packages, native modules, CUDA and stores. Exit code 1 "
        "when something that redknot needs does not work.",
    )
    parser.add_argument("--store", action="append", default=[], metavar="URL", help="try a store")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    checks: list[Callable[[], list[Finding]]] = [_python, _cpu, _memory, _packages, _native, _cuda]
    findings = [finding for check in checks for finding in _guarded(check)]
    for url in args.store:
        findings += _guarded(lambda url=url: [_store(url)])  # type: ignore[misc]
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.state:8} {finding.name:16} {finding.value}")
            if finding.advice:
                print(f"{'':25} -> {finding.advice}")
    return int(any(finding.state == "broken" for finding in findings))


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:  # a check that fails is a finding, not the end of the others
        name = getattr(check, "__name__", "check").strip("_<>")
        return [Finding(name, "broken", f"{type(error).__name__}: {error}")]


def _python() -> list[Finding]:
    fine = sys.version_info >= (3, 10)
    advice = "" if fine else "install Python 3.10 or newer"
    return [Finding("python", "ok" if fine else "broken", platform.python_version(), advice)]


def _cpu() -> list[Finding]:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                flags = set(value.split())
            if name.strip() == "model name":
                model = value.strip()
    seen = [isa for isa in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if isa in flags]
    value = f"{model}, {os.cpu_count()} cores, {' '.join(seen) or 'no AVX2'}"
    advice = "" if "avx2" in flags else "kernels run in their generic form, several times slower"
    return [Finding("cpu", "ok" if "avx2" in flags else "slow", value, advice)]


def _memory() -> list[Finding]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(n) * page for n in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    low = free < 2 << 30
    advice = "give Engine a kv_budget: by default it takes a quarter of what is free" if low else ""
    value = f"{bytes_text(free)} free of {bytes_text(total)}"
    return [Finding("memory", "low" if low else "ok", value, advice)]


def _packages() -> list[Finding]:
    findings = []
    for name in ("torch", "transformers", "safetensors", "numpy"):
        findings.append(Finding(name, "ok", version(name)))
    from transformers import __version__ as found

    major, minor, *_ = (int(part) for part in found.split(".")[:3] if part.isdigit())
    if not (5, 16) <= (major, minor) < (6, 0):
        findings[1] = Finding(
            "transformers", "broken", found, "pip install 'transformers>=5.16.1,<6'"
        )
    for name, extra in _OPTIONAL.items():
        try:
            findings.append(Finding(name, "ok", version(name)))
        except PackageNotFoundError:
            findings.append(
                Finding(name, "absent", "not installed", f"pip install 'redknot[{extra}]'")
            )
    return findings


def _native() -> list[Finding]:
    findings = []
    for name, module in (("ops", "redknot.ops"), ("allocator", "redknot._memory")):
        try:
            importlib.import_module(module)
            findings.append(Finding(name, "ok", "loads"))
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            findings.append(
                Finding(name, "broken", line, "build it: make build, or pip install . again")
            )
    return findings


def _cuda() -> list[Finding]:
    import torch

    built = torch.version.cuda
    if built is None:
        return [Finding("cuda", "absent", "torch is a CPU build", "")]
    if not torch.cuda.is_available():
        return [Finding("cuda", "absent", f"torch for CUDA {built}, no device found", "")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    value = f"torch for CUDA {built}; {', '.join(names)}"
    from redknot.ops import has_cuda_kernels

    if not has_cuda_kernels():
        advice = "to use the GPU, install redknot again where nvcc is on PATH"
        return [Finding("cuda", "absent", f"{value}; redknot was built without CUDA", advice)]
    return [Finding("cuda", "ok", value)]


def _store(url: str) -> Finding:
    from redknot.store.admin import StoreAdmin

    name = url.partition(":")[0]
    try:
        with StoreAdmin(url) as admin:
            stats = admin.stats()
    except RedknotError as error:
        return Finding(
            name, "broken", str(error), "engines work without it, and compute everything"
        )
    return Finding(name, "ok", f"{stats['segments']} segments, {bytes_text(stats['bytes'])}")
