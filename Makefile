# Every target sets up its own environment with plain pip; repeated, it starts at once.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning make everything many times slower where others use the cores, too.
export GOMP_SPINCOUNT ?= 500
# Tests run in so many processes at once; each file's stay together, with what they share.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile

.PHONY: quickstart test test-slow check format help

help:
	@echo "make quickstart   train and use an image-prompt adapter here, and open report.html"
	@echo "make test         run the tests, in TEST_PROCESSES=2 processes"
	@echo "make test-slow    run the tests, also those that take minutes or up to 12 GB"
	@echo "make check        style, types, import directions"
	@echo "make format       put the code in its style"

quickstart: .venv/installed
	$(BIN)/imprompt quickstart

test: .venv/installed-test
	$(PYTEST)

test-slow: .venv/installed-test
	IMPROMPT_SLOW_TESTS=1 $(PYTEST)

check: .venv/installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

# torch first and pinned: a looser requirement may bring several gigabytes of CUDA along.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[test]" -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed-test
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@
