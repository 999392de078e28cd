"""The address of a number: command, hardware, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from redknot.eval.bench.options import Options, cache_bytes
from redknot.eval.bench.roofs import Roofs

__all__ = ["address"]

_CPUINFO = Path("/proc/cpuinfo")
_TOLD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def address(command: str, options: Options, roofs: Roofs) -> dict[str, Any]:
    """Where the rows of this run come from."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": _hardware(options),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
        },
        "threads": torch.get_num_threads(),
        "isa": torch.ops.redknot._cpu_isa(""),
        "dtype": options.dtype,
        "roofs": roofs.to_dict(),
        "rotation_bytes": options.rotation_bytes,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware(options: Options) -> str:
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    info = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    name = re.search(r"model name\s*: (.+)", info)
    flags = re.search(r"flags\s*: (.+)", info)
    known = [flag for flag in _TOLD_FLAGS if flags and flag in flags[1].split()]
    return (
        f"{os.cpu_count()} cores of {name[1] if name else platform.processor()} "
        f"({', '.join(known)}), {cache_bytes() >> 20} MiB cache"
    )
