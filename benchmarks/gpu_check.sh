#!/usr/bin/env bash
# Builds from source on a GPU machine, runs the GPU tests, and measures; needs no network.
#
#   benchmarks/gpu_check.sh [--dry-run] OUT [PACKAGES]
#
# --dry-run looks whether everything needed is there, lists the steps and the tests, and ends: on a
# machine that prepares PACKAGES no GPU is needed for it.
# OUT gets every log and result: small text and JSON files. Needed: nvcc >= 12.0, g++, Python with
# its headers, torch with CUDA, numpy, pytest, setuptools, pybind11, cmake, ninja; nothing else
# (CUTLASS is not used). Python packages that are not installed are taken from PACKAGES: a folder of
# wheels, or one that packages were installed into (pip install --target). They come before the
# installed ones, so put only what is missing there. PYTHON names the interpreter, CMAKE_ARGS adds
# options of CMake. Kernels are built for this GPU alone. Every step runs even when one before it
# failed, until 9 minutes are over; the exit code tells whether all passed.
set -uo pipefail
dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if (($# < 1)); then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 2
fi
SECONDS=0
readonly limit_s=530
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
packages=
if (($# > 1)); then
  packages=$(cd "$2" && pwd) || exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

if [[ -n $packages ]] && compgen -G "$packages/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" \
    "$packages"/*.whl || exit 1
  packages=$out/site
fi
export PYTHONPATH=$PWD/python${packages:+:$packages}
PATH=${packages:+$packages/bin:}$PATH
for name in nvcc g++; do
  command -v "$name" >/dev/null || { echo "gpu_check: no $name on PATH"; exit 1; }
done
# A folder of the repository is no package: `cmake` has no __init__.py there.
"$python" - <<'PY' || exit 1
import importlib.util, shutil, sys

def found(name):
    spec = importlib.util.find_spec(name)
    return (spec is not None and spec.origin is not None) or name in programs and shutil.which(name)

programs = ("cmake", "ninja")
needed = ("torch", "numpy", "pytest", "setuptools", "pybind11", *programs)
missing = [name for name in needed if not found(name)]
sys.exit(f"gpu_check: missing Python packages: {' '.join(missing)}" if missing else 0)
PY

failed=()
step() { # most seconds, name, command...
  local most=$1 name=$2 begin=$SECONDS left=$((limit_s - SECONDS))
  shift 2
  if [[ -n $dry_run ]]; then
    echo "=== $name (at most $most s): $*"
    return
  fi
  if ((left < 5)); then
    echo "=== $name: not run, the time is over"
    failed+=("$name")
    return
  fi
  echo "=== $name"
  timeout --kill-after 5 $((left < most ? left : most)) "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 40 "$out/$name.log"
  echo "=== $name: exit code $code, $((SECONDS - begin)) s" # 124: out of time
  ((code == 0)) || failed+=("$name")
}

step 30 machine bash -ec "nvidia-smi; nvcc --version; $python -c 'import torch
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())
print(torch.cuda.get_device_properties())'"
# The builds that users get: SASS of 90a for Hopper, of 80 for 8.x, PTX of 80 for what came later.
arch=80
[[ $("$python" -c 'import torch; print(torch.cuda.get_device_capability())' 2>/dev/null) == "(9, 0)" ]] &&
  arch=90a-real
CMAKE_ARGS="-DREDKNOT_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$arch ${CMAKE_ARGS:-}" \
  step 300 build "$python" setup.py build_ext --inplace
# Registers, shared memory and spills of what this call compiled.
step 20 ptxas "$python" - "$out/build.log" <<'PY'
import subprocess, sys

sys.path.insert(0, "tools")
from cuda_report import parse_ptxas, readable, table

kernels = parse_ptxas(open(sys.argv[1]).read())
names = subprocess.run(["c++filt"], input="\n".join(name for name, _ in kernels), text=True,
                       stdout=subprocess.PIPE, check=True).stdout.splitlines()
for kernel, name in zip(kernels.values(), names):
    kernel.name = readable(name)
print(table(kernels.values()) if kernels else "no kernel was compiled by this call")
PY
tests=(tests/test_cuda_ops.py tests/test_cuda_attention.py tests/test_cuda_select.py
  tests/test_cuda_ffn.py)
if [[ -n $dry_run && -e python/redknot/_ops.so ]]; then
  "$python" -m pytest -m gpu --collect-only "${tests[@]}" | grep collected
fi
step 120 test "$python" -m pytest -m gpu -rs "${tests[@]}" --junitxml "$out/test.xml"
if "$python" -c 'import transformers' 2>/dev/null; then
  step 60 engine "$python" -m pytest -m gpu -rs tests/test_cuda_engine.py
else
  echo "=== engine: not run, no transformers"
fi
for name in rope attention ffn; do # each measures the roofs first
  step 120 "bench-$name" \
    "$python" -m redknot.cli bench "$name" --device cuda --quick --json "$out/bench-$name.json"
done
step 60 pages "$python" benchmarks/gpu_pages.py --json "$out/pages.json"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step 80 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -m gpu "${tests[@]}" -k "small and not captured"
  done
else
  echo "=== memcheck, racecheck: not run, no compute-sanitizer on PATH"
fi
# Performance counters are for administrators on many machines: what ncu cannot do is no failure.
if [[ -n $dry_run ]]; then
  echo "gpu_check: everything needed is here; nothing was run"
  exit 0
fi
if command -v ncu >/dev/null && ((SECONDS < limit_s - 20)); then
  echo "=== ncu"
  timeout --kill-after 5 60 ncu --kernel-name 'regex:(attend|decode)_kernel' \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
    --section Occupancy --section LaunchStats --section WarpStateStats \
    "$python" - >"$out/ncu.log" 2>&1 <<'PY'
from redknot.eval.bench.options import Options
from redknot.eval.bench.paged_inputs import Case, build
from redknot.eval.bench.shapes import SHAPES

for kind, heads, lengths in (("prefill", "global", (8192,)), ("prefill", "local", (8192,)),
                             ("decode", "global", (8192,) * 16), ("decode", "mixed", (8192,) * 16)):
    case = Case(SHAPES["Llama-3-8B"], kind, heads, lengths)
    build(case, Options(device="cuda", quick=True))[0].attend()
PY
  echo "=== ncu: exit code $?; see ncu.log"
else
  echo "=== ncu: not run"
fi

if ((${#failed[@]})); then
  echo "gpu_check: failed: ${failed[*]} ($SECONDS s)"
  exit 1
fi
echo "gpu_check: passed in $SECONDS s; results in $out"
