# `make demo` and `make test` start from nothing: own virtual environment, pinned packages, build.
# Everything is made once and again only when what it was made from has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The commands here are about the CPU, so that nvcc does not slow them; `make cuda-check` has its
# own tree. A build with kernels for the GPU of this machine: make demo CUDA=ON
CUDA ?= OFF
export CMAKE_ARGS := -DREDKNOT_CUDA=$(CUDA) -DREDKNOT_WERROR=ON
DEMO_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= $(shell nproc)

# Prints the include folder of CUTLASS; importing it would want CUDA.
CUTLASS_DIR := $(BIN)/python -c 'import importlib.util as u; \
  print(*u.find_spec("cutlass_library").submodule_search_locations, sep="")' \
  | sed 's|$$|/source/include|'

NATIVE := $(shell find CMakeLists.txt cmake include csrc -type f)
CPP := $(shell find csrc include tests -type f \
         \( -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help demo test test-cpp test-python test-transformers lint format build cuda-check wheel clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo [DEMO_ARGS=...]   the main job on the embedded model"
	@echo "make test                   C++ tests with sanitizers, Python tests, lint"
	@echo "make cuda-check             compile and inspect the CUDA kernels; needs nvcc, no GPU"
	@echo "make test-transformers VERSION=5.16.1   the model tests on another transformers"
	@echo "make lint | format | build | wheel | clean"

# --- set-up ---------------------------------------------------------------------------------------
# Stamps live in the environment they describe and vanish with it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "redknot: $(PYTHON) must be Python >= 3.11 (older ones: pip install . without the pins);" \
	       "on Debian or Ubuntu: apt-get install python3"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "redknot: Python's venv is missing; on Debian or Ubuntu: apt-get install python3-venv"; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.pins: constraints.txt pyproject.toml | $(BIN)/python
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "redknot: no C++ compiler found; on Debian or Ubuntu: apt-get install g++"; exit 2; }
	$(PIP) -c constraints.txt setuptools wheel cmake ninja pybind11 torch==2.13.0
	$(PIP) -c constraints.txt --no-deps nvidia-cutlass # headers, for tests/simt/cute
	touch $@

$(VENV)/.installed: setup.py $(VENV)/.pins
	$(PIP) -c constraints.txt --no-build-isolation -e '.[test,dev,plot]'
	touch $@

$(VENV)/.native: $(NATIVE) $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

build: $(VENV)/.native

# --- the two commands -----------------------------------------------------------------------------
demo: build
	$(BIN)/redknot demo $(DEMO_ARGS)

test: lint test-cpp test-python

test-cpp: $(VENV)/.pins
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DREDKNOT_SANITIZE=ON -DREDKNOT_BUILD_TESTS=ON -DREDKNOT_BUILD_PYTHON=OFF \
	  -DREDKNOT_CUDA=OFF -DREDKNOT_WERROR=ON -DREDKNOT_CUTLASS_DIR="$$($(CUTLASS_DIR))"
	$(BIN)/cmake --build build/sanitize --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel $(JOBS)

test-python: build
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# --- habits ---------------------------------------------------------------------------------------
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# --- other checks ---------------------------------------------------------------------------------
cuda-check: $(VENV)/.pins
	$(BIN)/python tools/cuda_check.py --build build/cuda --jobs $(JOBS)

# The other transformers in an environment of its own; it uses the modules that `build` put in place.
TRANSFORMERS_VENV = build/venv-transformers-$(VERSION)
test-transformers: build
	@test -n "$(VERSION)" || { echo "usage: make test-transformers VERSION=5.16.1"; exit 2; }
	test -x $(TRANSFORMERS_VENV)/bin/python || $(BIN)/python -m venv $(TRANSFORMERS_VENV)
	grep -viE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt \
	  > $(TRANSFORMERS_VENV)/constraints.txt
	$(TRANSFORMERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c $(TRANSFORMERS_VENV)/constraints.txt torch==2.13.0 numpy safetensors tqdm pytest hypothesis \
	  "transformers==$(VERSION)"
	PYTHONPATH=python $(TRANSFORMERS_VENV)/bin/python -m pytest -m transformers $(PYTEST_ARGS)

# What a user's pip builds: CUDA where nvcc is, warnings are no errors.
wheel: export CMAKE_ARGS :=
wheel: $(VENV)/.installed
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist python/redknot/*.so python/*.egg-info
	rm -f $(VENV)/.installed $(VENV)/.native
