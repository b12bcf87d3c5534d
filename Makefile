# Every target sets up .venv first; the second call is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
RUN ?= runs/digits

.PHONY: help train test check format bench examples clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.run  ## MobileNetV2 on real digits over an emulated cloud + edge + end cluster
	$(BIN)/spanwise train examples/digits.toml --run $(RUN)

test: $(VENV)/.dev  ## all tests, those that start no processes on two cores
	$(BIN)/python -m pytest -n 2 tests/unit tests/property tests/golden
	$(BIN)/python -m pytest tests/distributed

check: $(VENV)/.dev  ## lint, types, import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: $(VENV)/.dev  ## run examples 01 to 05
	for example in examples/0*.py; do echo "== $$example"; timeout 300 $(BIN)/python $$example || exit 1; done

bench: $(VENV)/.dev  ## a short form of every benchmark
	for table in benchmarks/*/run.py; do echo "== $$table"; $(BIN)/python $$table --short || exit 1; done

clean:  ## remove .venv, caches and runs
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch is named with its exact version in the same call as all others, so that no range pulls another build.
$(VENV)/.run: requirements/run.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/run.txt editables hatchling
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	$(PIP) install -r requirements/dev.txt
	touch $@
