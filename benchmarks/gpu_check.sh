#!/usr/bin/env bash
# Builds from source on a GPU machine, runs the GPU tests, and measures; needs no network.
#
#   benchmarks/gpu_check.sh OUT [PACKAGES]
#
# OUT gets every log and result. Needed: nvcc, g++, Python with its headers, torch with CUDA, numpy,
# pytest, setuptools, pybind11, cmake, ninja. Python packages that are not installed are taken from
# PACKAGES: a folder of wheels, or one that packages were installed into (pip install --target). They
# come before the installed ones, so put only what is missing there.
# Every step runs even when one before it failed; the exit code tells whether all passed.
set -uo pipefail
if (($# < 1)); then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
packages=${2:+$(cd "$2" && pwd)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin

if compgen -G "$packages/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$packages"/*.whl || exit 1
  packages=$out/site
fi
export PYTHONPATH=$PWD/python${packages:+:$packages}
"$python" - <<'PY' || exit 1
import importlib.util, shutil, sys
needed = ("torch", "numpy", "pytest", "setuptools", "pybind11", "cmake", "ninja")
missing = [n for n in needed if importlib.util.find_spec(n) is None and shutil.which(n) is None]
sys.exit(f"gpu_check: missing Python packages: {' '.join(missing)}" if missing else 0)
PY

failed=()
step() { # name command...
  local name=$1 begin=$SECONDS
  shift
  echo "=== $name"
  "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 40 "$out/$name.log"
  echo "=== $name: exit code $code, $((SECONDS - begin)) s"
  ((code == 0)) || failed+=("$name")
}

step machine bash -c "nvidia-smi; nvcc --version; $python -c 'import torch
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'"
CMAKE_ARGS="-DREDKNOT_CUDA=ON ${CMAKE_ARGS:-}" step build "$python" setup.py build_ext --inplace
tests=(tests/test_cuda_ops.py tests/test_cuda_attention.py tests/test_cuda_select.py)
step test "$python" -m pytest -m gpu -rs "${tests[@]}" --junitxml "$out/test.xml"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -m gpu "${tests[@]}" -k "small and not captured"
  done
else
  echo "=== memcheck: no compute-sanitizer on PATH"
fi
step pages "$python" benchmarks/gpu_pages.py --json "$out/pages.json"
for name in attention rope; do
  step "bench-$name" timeout 150 \
    "$python" -m redknot.cli bench "$name" --device cuda --quick --json "$out/bench-$name.json"
done
if command -v ncu >/dev/null; then
  step ncu timeout 90 ncu --kernel-name regex:attend_kernel --launch-count 6 --set full \
    "$python" -m redknot.cli bench attention --device cuda --quick
fi

if ((${#failed[@]})); then
  echo "gpu_check: failed: ${failed[*]}"
  exit 1
fi
echo "gpu_check: passed; results in $out"
