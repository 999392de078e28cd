"""Builds the native rooms with CMake; every source and flag is known to CMake alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def build_dir() -> Path:
    """Separate trees per Python and torch, so that one never links the other's objects."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return ROOT / "build" / f"{tag}-torch{version('torch')}"


class CMakeBuild(build_ext):
    """`cmake` configures and builds; `cmake --install` puts _ops.so and _memory.so in place."""

    def run(self) -> None:
        tree = build_dir()
        package = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DPython3_EXECUTABLE={sys.executable}", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(tree), "--parallel", jobs], check=True)
        subprocess.run(
            ["cmake", "--install", str(tree), "--prefix", str(package / "redknot")], check=True
        )

    def get_outputs(self) -> list[str]:
        return []


# The one Extension only tells setuptools that the wheel holds native code.
setup(ext_modules=[Extension("redknot._memory", sources=[])], cmdclass={"build_ext": CMakeBuild})
