"""Builds the native rooms with CMake; every source and flag is known to CMake alone."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, folder_variable: str, debian_package: str) -> str:
    """The pip package's own binary first: the bin folder of a venv need not be on PATH."""
    try:
        folder = Path(getattr(importlib.import_module(name), folder_variable))
    except (ImportError, AttributeError):
        folder = None
    found = shutil.which(name, path=str(folder)) if folder else None
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(
            f"redknot: no {name} found; pip install {name}, "
            f"or on Debian or Ubuntu: apt-get install {debian_package}"
        )
    return found


def build_tree(*, in_place: bool) -> Path:
    """One tree per Python, torch and kind of build: none links what another compiled."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-torch{version('torch')}"
    return ROOT / "build" / (tag if in_place else f"{tag}-wheel")


class CMakeBuild(build_ext):
    """`cmake` configures and builds; `cmake --install` puts _ops.so and _memory*.so in place."""

    def run(self) -> None:
        cmake = find_tool("cmake", "CMAKE_BIN_DIR", "cmake")
        ninja = find_tool("ninja", "BIN_DIR", "ninja-build")
        tree = build_tree(in_place=bool(self.inplace))
        package_root = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        configure = [
            cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}", "-DREDKNOT_CUDA=AUTO",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        if not self.inplace:
            # An isolated build sees torch at a new path each time; forget the last one's.
            configure.append("--fresh")
        jobs = str(self.parallel or os.cpu_count() or 1)
        for command in (
            configure,
            [cmake, "--build", str(tree), "--parallel", jobs],
            [cmake, "--install", str(tree), "--prefix", str(package_root / "redknot")],
        ):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"redknot: failed: {shlex.join(command)}") from error

    def get_outputs(self) -> list[str]:
        return []


# The one Extension only tells setuptools that the wheel holds native code.
setup(ext_modules=[Extension("redknot._memory", sources=[])], cmdclass={"build_ext": CMakeBuild})
