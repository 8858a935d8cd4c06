# Everything on a fresh machine with Python 3.11 or newer, make and a package index:
#   make quickstart    the first discovery, with a real language model
#   make test          the tests; as root, the jail's attacks and benign programs once more as an ordinary user
#   make test-unprivileged   as root, all tests of the jail as an ordinary user
#   make coverage      the tests, and which lines they leave out
#   make check         what CI checks beside them: format, lint, types
#   make proof         the tests that take minutes or real models

PYTHON ?= python3
VENV ?= .venv
# dev,eval runs the agreement with lm-evaluation-harness too, as CI does.
EXTRAS ?= dev
BIN = $(VENV)/bin
QUICKSTART = runs/quickstart-1

# The budgets are for two cores: two threads, or in `make test` two processes of one thread, each with whole files of
# tests. Passive, since threads that spin while they wait slow each other down where cores are shared.
JOBS ?= 2
THREADS = 2
TEST_ENVIRONMENT = OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} TOKENIZERS_PARALLELISM=false
PYTEST = $(TEST_ENVIRONMENT) $(BIN)/python -m pytest

.PHONY: quickstart test test-unprivileged coverage check proof clean

quickstart: $(VENV)/.installed
	@if [ -e $(QUICKSTART)/archive.db ]; then $(BIN)/selfdev resume $(QUICKSTART); \
	else $(BIN)/selfdev run quickstart --out $(QUICKSTART); fi

test: THREADS = 1
test: $(VENV)/.installed-dev
	$(PYTEST) --numprocesses $(JOBS) --dist loadfile
	$(TEST_ENVIRONMENT) $(BIN)/python tests/unprivileged.py tests/sandbox/test_attacks_*.py tests/sandbox/test_benign.py

coverage: $(VENV)/.installed-dev
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

test-unprivileged: $(VENV)/.installed-dev
	$(TEST_ENVIRONMENT) $(BIN)/python tests/unprivileged.py tests/sandbox

proof: $(VENV)/.installed-dev
	$(PYTEST) -m proof

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# Editable, so that only a change of the dependencies installs anew.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "error: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
