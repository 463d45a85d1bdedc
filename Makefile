# One target per check; CI runs the same ones. `make quickstart`, `make test` and `make wheel` need only Python ≥ 3.11.
PYTHON ?= python3
BIN := .venv/bin
# torch and torchvision must come from one index; a stray wheel folder would break the pair.
PIP := PIP_FIND_LINKS= $(BIN)/pip install --quiet --disable-pip-version-check
# One thread for each test process, because several run at the same time.
TEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := $(TEST) $(BIN)/python -m pytest -n auto
# With versions that have not been tested together, deprecation warnings between packages are listed and do not fail.
WARN := -W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning

.PHONY: quickstart test test-slow test-all soak test-latest test-oldest wheel check lint format types imports lock

quickstart: .venv/run
	$(BIN)/siglit quickstart

test: .venv/test
	$(PYTEST) -m "not slow"

test-slow: .venv/test
	$(PYTEST) -m slow

test-all: .venv/test
	$(PYTEST)

# Kills, damaged files, full disks, for up to an hour; not part of any other target. `make soak ARGS="--part disk"`.
soak: .venv/test
	$(TEST) $(BIN)/python -m tests.soak $(ARGS)

# The newest release of every package, in a separate environment.
test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	PIP_FIND_LINKS= .venv-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[test]'
	$(TEST) .venv-latest/bin/python -m pytest -n auto $(WARN)

# The lowest versions that pyproject.toml allows; they have wheels for Python 3.11.
test-oldest: .venv/uv
	test -x .venv-oldest/bin/python || $(BIN)/uv venv --quiet --python 3.11 .venv-oldest
	$(BIN)/uv pip install --quiet --upgrade --python .venv-oldest --resolution lowest-direct -e '.[test]'
	$(TEST) .venv-oldest/bin/python -m pytest -n auto $(WARN)

# The wheel alone, in an empty environment outside the checkout: every file that a user needs is in it.
wheel:
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; export PIP_FIND_LINKS=; \
	$(PYTHON) -m venv "$$folder/env"; \
	"$$folder/env/bin/pip" wheel --quiet --no-deps --wheel-dir "$$folder" .; \
	"$$folder/env/bin/pip" install --quiet --constraint constraints.txt "$$folder"/siglit-*.whl; \
	cd "$$folder"; env/bin/siglit quickstart

check: lint types imports test-all

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

imports: .venv/test
	$(BIN)/lint-imports

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolves every package again, for all extras and all Python versions; the other targets install these versions.
lock: .venv/uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" --output-file constraints.txt

.venv/run: pyproject.toml constraints.txt
	@echo "installing siglit and its dependencies into .venv (takes a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e .
	touch $@

.venv/test: .venv/run
	$(PIP) -c constraints.txt -e '.[test]'
	touch $@

.venv/uv:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) uv
	touch $@
