"""The rooms of the house: each uses only the rooms to its left, and each fact stands once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "redknot"

PYTHON_ROOMS = ["ops", "heads", "cache", "store", "recovery", "models", "engine", "eval", "cli"]
# What every room may use: no room itself, it knows nothing of redknot's work.
PYTHON_GROUND = {"errors", "checks", "_ops", "_memory"}
CPP_ROOMS = {  # room: the folders whose headers it may include
    "include/redknot": ["include/redknot"],
    "csrc/memory": ["include/redknot", "csrc/memory"],
    "csrc/cpu": ["include/redknot", "csrc/memory", "csrc/cpu"],
    "csrc/cuda": ["include/redknot", "csrc/memory", "csrc/cuda"],
    "csrc/torch": ["include/redknot", "csrc/memory", "csrc/cpu", "csrc/cuda", "csrc/torch"],
}
CPP_SUFFIXES = {".h", ".hpp", ".cpp", ".cu", ".cuh"}
SOURCE_FOLDERS = ["python", "csrc", "include", "tests", "tools", "benchmarks", "examples", "cmake"]
HARD_LIMIT_LINES = 800


def room_of(path: Path) -> str | None:
    """The Python room of a file; None for the package itself (`__init__`) and its ground."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return first if first in PYTHON_ROOMS else None


def redknot_imports(tree: ast.Module, module: list[str]) -> set[str]:
    """First name below `redknot` of every import, at whatever depth; relative ones resolved."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level + 1] if node.level else []
            stem = base + (node.module.split(".") if node.module else [])
            targets = [[*stem, *alias.name.split(".")] for alias in node.names]
        else:
            continue
        names |= {target[1] for target in targets if target[0] == "redknot" and len(target) > 1}
    return names


def files_in(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in CPP_SUFFIXES)


@pytest.mark.parametrize("room", PYTHON_ROOMS)
def test_python_room_imports_only_rooms_to_its_left(room: str) -> None:
    allowed = set(PYTHON_ROOMS[: PYTHON_ROOMS.index(room) + 1]) | PYTHON_GROUND
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) != room:
            continue
        module = ["redknot", *path.relative_to(PACKAGE).with_suffix("").parts]
        # A package's own name is what its relative imports start from.
        parent = module[:-1]
        found = redknot_imports(ast.parse(path.read_text()), parent)
        known = set(PYTHON_ROOMS) | PYTHON_GROUND
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(found & known - allowed)]
    assert not wrong, f"{room} may import {sorted(allowed)}"


def test_every_python_room_is_on_the_list() -> None:
    entries = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if not p.name.startswith("_")}
    modules = {e for e in entries if (PACKAGE / e).is_dir() or (PACKAGE / f"{e}.py").exists()}
    assert modules - PYTHON_GROUND <= set(PYTHON_ROOMS)


@pytest.mark.parametrize("room", CPP_ROOMS)
def test_cpp_room_includes_only_rooms_to_its_left(room: str) -> None:
    wrong = []
    for path in files_in(room):
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            beside = (path.parent / name).resolve()
            roots = [
                ROOT / "include",
                ROOT / "csrc",
                *(ROOT / folder for folder in CPP_ROOMS[room]),
            ]
            candidates = [beside, *((root / name).resolve() for root in roots)]
            homes = [str(c.relative_to(ROOT)) for c in candidates if c.is_file()]
            if not any(home.startswith(f"{f}/") for home in homes for f in CPP_ROOMS[room]):
                wrong.append(f'{path.relative_to(ROOT)}: "{name}"')
    assert not wrong


@pytest.mark.parametrize(
    ("room", "banned"),
    [
        ("include/redknot", r"torch/|ATen/|c10/|pybind11/|cuda"),
        ("csrc/memory", r"torch/|ATen/|c10/|pybind11/|cuda"),
        ("csrc/cpu", r"torch/|ATen/|c10/|pybind11/|cuda"),
        ("csrc/cuda", r"torch/|ATen/|c10/|pybind11/"),
    ],
)
def test_only_the_torch_room_sees_torch(room: str, banned: str) -> None:
    pattern = re.compile(rf"^\s*#\s*include\s*<({banned})", re.MULTILINE)
    assert not [str(p.relative_to(ROOT)) for p in files_in(room) if pattern.search(p.read_text())]


def test_no_file_is_over_the_hard_limit() -> None:
    suffixes = CPP_SUFFIXES | {".py", ".pyi", ".cmake"}
    files = [
        path
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.is_file()
    ]
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert not {name: n for name, n in lengths.items() if n > HARD_LIMIT_LINES}


def test_the_version_stands_in_pyproject_alone() -> None:
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    patterns = [
        r"__version__\s*=\s*[\"']\d+\.\d",
        rf"redknot[^\n]{{0,20}}\b{re.escape(version[1])}\b",
    ]
    found = []
    for folder in ["python", "csrc", "include", "cmake"]:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in CPP_SUFFIXES | {".py", ".pyi", ".cmake", ".txt"}:
                text = path.read_text()
                found += [str(path.relative_to(ROOT)) for p in patterns if re.search(p, text)]
    assert not found


def test_setup_py_stays_small() -> None:
    assert (ROOT / "setup.py").read_text().count("\n") < 100


def test_ptx_and_shared_memory_stand_only_behind_their_wrappers() -> None:
    """Elsewhere the executor could not run them: it has no PTX, and no static shared memory."""
    pattern = re.compile(r"\basm\b|__shared__")
    wrong = []
    for path in files_in("csrc/cuda"):
        if path.parent.name == "ptx":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line.split("//")[0]):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong


def test_every_ptx_wrapper_has_a_twin_on_the_host() -> None:
    for path in files_in("csrc/cuda/ptx"):
        for function in path.read_text().split("__device__ __forceinline__")[1:]:
            body = function.split("\n}\n")[0]
            if "asm" in body or "RK_EACH" in body:
                assert re.search("#ifn?def RK_SIMT", body), f"{path.name}: {body}"
