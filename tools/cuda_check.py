"""Compiles the CUDA kernels for every architecture and inspects the result. Needs nvcc, no GPU.

1. builds _ops.so with CUDA in it; 2. tells registers, shared memory and spills of every kernel;
3. looks for the instructions that a kernel was written for in its machine code; 4. loads _ops.so
under the CPU-only torch and finds the CUDA kernels registered; 5. compiles csrc/torch against the
headers of the oldest torch that redknot supports. Every step runs; any problem fails the check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_report import Kernel, judge, nameless_complaints, parse_ptxas, parse_sass, readable, table

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a")


def run(command: list[str], *, check: bool = True, **kwargs: object) -> str:
    """Output and errors together; a failure that `check` forbids ends the program with them."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    if check and done.returncode:
        raise SystemExit(f"{done.stdout}\ncuda-check: failed: {shlex.join(command)}")
    return done.stdout if done.returncode == 0 else f"{done.stdout}\n@failed {done.returncode}"


def find_nvcc() -> Path:
    """The compiler that CMake will find too; absent, the check fails: it must never be skipped."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit(
            "cuda-check: no nvcc on PATH; install the CUDA toolkit, 12.0 or newer, or set CUDACXX"
        )
    return Path(nvcc)


def tool(name: str) -> str:
    """A program of this environment, else of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"cuda-check: no {name}; pip install {name}")
    return found


def build_ops(tree: Path, jobs: int) -> tuple[Path, str, list[str]]:
    """Compiles every kernel anew, so that ptxas speaks; ccache replays what it said."""
    for objects in (tree / "csrc/cuda/CMakeFiles").glob("redknot_cuda*.dir"):
        shutil.rmtree(objects)
    run(
        [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DREDKNOT_CUDA=ON",
            "-DREDKNOT_WERROR=ON",
        ]
    )
    # -k 0: the table is worth most when a kernel of it failed.
    build = [tool("cmake"), "--build", str(tree), "--target", "_ops", "--parallel", str(jobs)]
    log = run([*build, "--", "-k", "0"], check=False)
    if "\n@failed" in log:
        errors = [line for line in log.splitlines() if re.search(r"\b(error|FAILED)\b", line)]
        return tree / "csrc/torch/_ops.so", log, ["_ops.so does not build", *errors[:20]]
    return tree / "csrc/torch/_ops.so", log, []


def disassemble(library: Path, tree: Path) -> tuple[str, str]:
    """Machine code and list of PTX in `library`; the tools live in an environment of their own."""
    venv = tree.parent / "venv-sass"
    python = venv / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(venv)])
    pins = ["-c", str(ROOT / "constraints.txt"), "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins])
    cuobjdump = next(venv.glob("lib/python*/site-packages/nvidia/*/bin/cuobjdump"))
    # cuobjdump finds nvdisasm on PATH.
    env = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}
    return (
        run([str(cuobjdump), "-sass", str(library)], env=env),
        run([str(cuobjdump), "--list-ptx", str(library)], env=env),
    )


def inspect_kernels(log: str, library: Path, tree: Path) -> list[str]:
    """Prints the table; returns what is wrong with the kernels."""
    kernels = parse_ptxas(log)
    problems = nameless_complaints(log)
    if library.exists():
        sass, ptx = disassemble(library, tree)
        for key, opcodes in parse_sass(sass).items():
            kernels.setdefault(key, Kernel(*key)).opcodes = opcodes
        if f"sm_{ARCHS[0]}" not in ptx:
            problems.append(f"_ops.so carries no PTX of {ARCHS[0]} for GPUs to come")
    names = run(["c++filt"], input="\n".join(name for name, _ in kernels)).splitlines()
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = readable(name)
    print(table(kernels.values()))
    return problems + judge(kernels.values(), ARCHS)


def check_registration(library: Path) -> list[str]:
    """The ops that csrc/torch/cuda implements have CUDA kernels once _ops.so is loaded."""
    sources = sorted((ROOT / "csrc/torch/cuda").glob("*.cpp"))
    ops = sorted({op for s in sources for op in re.findall(r'\.impl\("(\w+)"', s.read_text())})
    program = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([op for op in sys.argv[2:] if not has('redknot::' + op, 'CUDA')])\n"
    )
    answer = run([sys.executable, "-c", program, str(library), *ops], check=False)
    print(f"ops with a CUDA kernel: {', '.join(ops) or 'none'}")
    if not ops or answer.strip() != "[]":
        return [f"not registered for CUDA: {answer.strip()}"]
    return []


def oldest_torch() -> str:
    """The lower bound that pyproject.toml promises."""
    bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert bound
    return bound[1] + ".0" * (2 - bound[1].count("."))


def headers_of(version: str, folder: Path) -> Path:
    """torch/include of a version, out of its wheel; nothing else of the wheel is kept."""
    include = folder / "torch" / "include"
    if not (folder / ".complete").exists():
        wheels = folder / "wheel"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--no-deps", "--no-cache-dir", "--dest", str(wheels), f"torch=={version}"])
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith("torch/include")])
        shutil.rmtree(wheels)
        (folder / ".complete").touch()
    return include


def check_headers(tree: Path, jobs: int) -> list[str]:
    """Every file of _ops.so compiles, with its own flags, against the oldest torch's headers."""
    version = oldest_torch()
    include = headers_of(version, tree.parent / f"torch-{version}")
    commands = json.loads((tree / "compile_commands.json").read_text())

    def compile_one(entry: dict[str, str]) -> str | None:
        words = shlex.split(entry["command"])
        paths = [i for i, word in enumerate(words) if word.endswith("/torch/include")]
        assert paths, entry["file"]
        for i in paths:
            words[i] = str(include)
        words[words.index("-o") + 1] = os.devnull
        output = run(words, check=False, cwd=entry["directory"])
        return output if "\n@failed" in output else None

    ours = [e for e in commands if "/_ops.dir/" in e["command"]]
    with ThreadPoolExecutor(jobs) as pool:
        outputs = list(pool.map(compile_one, ours))
    failed = {e["file"]: output for e, output in zip(ours, outputs, strict=True) if output}
    for output in failed.values():
        print(output)
    print(f"{len(ours) - len(failed)} of {len(ours)} files compile against torch {version}")
    return [f"{file} does not compile against torch {version}" for file in failed]


def main() -> int:
    """Runs the steps in order; 1 when any found a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    tree = arguments.build.resolve()
    print(run([str(find_nvcc()), "--version"]).strip().splitlines()[-1])

    begin = time.monotonic()
    library, log, problems = build_ops(tree, arguments.jobs)
    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("kernels", lambda: inspect_kernels(log, library, tree)),
        ("registration", lambda: check_registration(library)),
        ("oldest torch", lambda: check_headers(tree, arguments.jobs)),
    ]
    print(f"=== build: {time.monotonic() - begin:.0f} s", flush=True)
    for name, step in steps:
        step_begin = time.monotonic()
        problems += step()
        print(f"=== {name}: {time.monotonic() - step_begin:.0f} s", flush=True)
    for problem in problems:
        print(f"cuda-check: {problem}")
    print(f"cuda-check: {'failed' if problems else 'passed'} in {time.monotonic() - begin:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
