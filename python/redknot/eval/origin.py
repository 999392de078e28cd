"""Where figures come from: command, date, hardware, versions."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["origin"]


def origin(command: str) -> dict[str, Any]:
    """Address of the figures of this process, for JSON."""
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores of {name[1] if name else platform.processor()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
