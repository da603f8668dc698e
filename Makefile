# Two commands for people: `make run` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready-
# Set to anything, it would make every worker of the tests compile all tests again, at every start.
export PYTHONDONTWRITEBYTECODE :=
# Torch goes first and alone: whatever is installed after it then finds its requirement satisfied.
TORCH  := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

# A worker takes whole files, in the order of tests/conftest.py: the longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# What no change waits for: it needs a GPU, or many minutes.
APART  := not cuda and not reliability and not long

.PHONY: run quick test slow long peft-oldest oldest lint types doctest docs wheel packages bench gpu reliability clean

run: $(READY)bench          ## plain LoRA and EBLoRA on the default stream, then the table and the report
	$(BIN)/manifold-cl run --resume

quick: $(READY)bench        ## the same on the small stream, in minutes
	$(BIN)/manifold-cl run --quick --resume

test: $(READY)dev           ## the fast suite
	$(PYTEST) -m "not slow and $(APART)"

.PHONY: coverage
coverage: $(READY)dev       ## share of lines that the tests run, other processes included; fails below 92 %
	$(PYTEST) -m "$(APART)" \
		--cov --cov-report term:skip-covered --cov-report json:build/coverage.json

slow: $(READY)dev           ## the tests that take more than a second each
	$(PYTEST) -m "slow and $(APART)" --durations 30

long: $(READY)dev           ## whole embedded streams on their real models, too long for every change
	$(PYTEST) -m long --timeout 3600 --durations 0

.PHONY: properties soak
properties: $(READY)dev     ## ten times the property cases of the slow suite, with new seeds
	OMP_NUM_THREADS=1 MANIFOLD_CL_PROPERTIES=many MANIFOLD_CL_PROPERTIES_OUT=benchmarks/results/properties.json \
		$(BIN)/python -m pytest -q tests/properties --timeout 3600

soak: $(READY)dev           ## ten thousand steps of every step: constraint, memory, time
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

peft-oldest: $(READY)dev    ## the PEFT tests on the oldest version supported
	$(BIN)/pip install -q --no-deps --upgrade --target build/peft-oldest peft==0.21.0
	PYTHONPATH=build/peft-oldest $(BIN)/python -m pytest -q tests/adapters/test_peft.py \
		tests/adapters/test_peft_refusals.py tests/adapters/test_export.py

oldest:                     ## the fast suite on the oldest versions that pyproject.toml allows
	$(PYTHON) .ci/oldest.py

lint: $(READY)dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)dev
	$(BIN)/mypy

doctest: $(READY)dev
	$(BIN)/python -m pytest -q --doctest-modules manifold_cl analysis

docs: $(READY)dev $(READY)docs   ## the site, and the tests of what builds it
	$(BIN)/python -m pytest -q tests/docs/test_extensions.py tests/docs/test_tutorials.py
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

wheel:                      ## wheel and sdist, whose content is compared with git
	$(PYTHON) .ci/packages.py --files

packages:                   ## the same, and each extra alone in a fresh environment; an hour
	$(PYTHON) .ci/packages.py

bench: $(READY)dev          ## the numbers of benchmarks/results
	for script in step bench_step bench_retractions bench_layer bench_subspace bench_analysis stream; do \
		$(BIN)/python benchmarks/$$script.py || exit 1; done

gpu: $(READY)dev            ## the tests and benchmarks that need a GPU, in one call
	$(BIN)/python benchmarks/gpu.py

reliability: $(READY)dev    ## kills, damaged and hostile files, full disks: counted, in benchmarks/results/reliability.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 tests/reliability -m reliability \
		--counts benchmarks/results/reliability.json

clean:
	rm -rf $(VENV) build dist docs/_build docs/tutorials .pytest_cache .mypy_cache .ruff_cache

# One stamp a set of extras; a change of the project file or the pins installs again.
$(READY)%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q $(TORCH) -c constraints.txt
	$(BIN)/pip install -q -e '.[$*]' -c constraints.txt
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip -c constraints.txt
