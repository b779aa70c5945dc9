# `make demo` and `make test` need Python 3.11 or newer with venv: the first run makes .venv and installs into it.
PYTHON ?= python3
# Two processes of one thread each; a file's tests stay together and share what they build.
PYTEST_ARGS ?= -n 2 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
# One stamp for each set of packages: an install runs again only when what it was made from changes.
RUNTIME := $(VENV)/.installed-runtime
DEVELOPMENT := $(VENV)/.installed-development
DEMO := demo

.PHONY: demo test lint types pytest wheel install clean
.DELETE_ON_ERROR:

demo: $(RUNTIME)
	@$(BIN)/python -m sparsify.cli.demo $(DEMO)

test: lint types pytest

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEVELOPMENT)
	$(BIN)/mypy

pytest: $(DEVELOPMENT)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

wheel: $(DEVELOPMENT)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

install: $(RUNTIME)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sparsify needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEVELOPMENT): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	@touch $@ $(RUNTIME)

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
