# `make demo` and `make test` need Python 3.11 or newer with venv: the first run makes .venv and installs into it.
PYTHON ?= python3
# Two processes of one thread each; a file's tests stay together and share what they build.
PYTEST_ARGS ?= -n 2 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
# One stamp for each set of packages: an install runs again only when what it was made from changes.
RUNTIME := $(VENV)/.installed-runtime
DEVELOPMENT := $(VENV)/.installed-development
# The native CPU kernels: the install makes them, this rule makes them again when they change.
LIBRARY := kernels/libsparsify_native.so
DEMO := demo

# What `make gpu` uses: a Python that has torch with CUDA or ROCm, triton, transformers, safetensors and pytest.
GPU_PYTHON ?= python3
GPU_RESULTS ?= gpu-results

.PHONY: demo test gpu lint types pytest wheel install clean
.DELETE_ON_ERROR:

demo: $(RUNTIME) $(LIBRARY)
	@$(BIN)/python -m sparsify.cli.demo $(DEMO)

test: lint types pytest

# Correctness on the device first, then speed: under 10 minutes, no network, nothing is installed.
gpu:
	@PYTHONPATH=.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m sparsify.evals.gpu_suite --out $(GPU_RESULTS) $(GPU_ARGS)

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEVELOPMENT)
	$(BIN)/mypy

pytest: $(DEVELOPMENT) $(LIBRARY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

wheel: $(DEVELOPMENT)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

install: $(RUNTIME) $(LIBRARY)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sparsify needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEVELOPMENT): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,eval,report,train]'
	@touch $@ $(RUNTIME)

# Where it cannot be made, a line says why and the work goes on without it: never with one of older sources.
$(LIBRARY): $(wildcard kernels/csrc/*.[ch]) kernels/build.py setup.py | $(BIN)/python
	@$(BIN)/python -m sparsify.kernels.build || { rm -f $@; [ "$$SPARSIFY_REQUIRE_NATIVE" != 1 ]; }

clean:
	rm -rf $(VENV) $(LIBRARY) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
