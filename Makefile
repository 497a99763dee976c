# make run    sets everything up and runs three experiments on embedded defaults
# make test   sets everything up and runs the fast test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= cpu-smoke
EXPERIMENTS ?= 3
DATA_DIR ?= runs/demo
PIPELINE := $(BIN)/python pipeline/pipeline.py --experiments $(EXPERIMENTS) --profile $(PROFILE) --data-dir $(DATA_DIR)

# Each program that is started would compile our modules again where byte-compilation is switched off.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run setup test test-mongodb test-services test-slow check compose-check format lock clean

run: setup
	@$(PIPELINE)

# Every run starts many processes, which would compile our own files anew where Python may not keep what it compiled. In
# a checkout that may not be written to they do.
setup: $(VENV)/ready
	@$(BIN)/python -m compileall -q common database cognition_base pipeline training >/dev/null 2>&1 || true

$(VENV)/ready: requirements.txt requirements-dev.txt tools/setup.sh
	@bash tools/setup.sh "$(PYTHON)" "$(VENV)"

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Of test-services what every change has to pass: the contract of stores, and kills, over the wire of MongoDB.
test-mongodb: setup
	$(BIN)/python -m pytest -m services -n 0 tests/contract tests/database/test_mongodb_store.py

test-services: setup
	$(BIN)/python -m pytest -m services -n 0

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not services and not gpu" -n 0 -s

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The compose files, read by docker compose's own parser; needs Go.
compose-check:
	@bash tools/compose_check/run.sh

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Compiles the pins anew after a change of requirements*.in.
lock: setup
	$(BIN)/uv pip compile -q --no-header --no-emit-index-url --no-emit-find-links requirements.in -o requirements.txt
	$(BIN)/uv pip compile -q --no-header --no-emit-index-url --no-emit-find-links requirements-dev.in -o requirements-dev.txt

clean:
	rm -rf $(VENV) runs .cache
