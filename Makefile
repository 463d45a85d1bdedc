# One target per check; CI runs the same ones. `make quickstart` and `make test` need nothing but Python ≥ 3.11.
PYTHON ?= python3
BIN := .venv/bin
# torch and torchvision must come from one index; a stray wheel folder would break the pair.
PIP := PIP_FIND_LINKS= $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart test check lint format types imports

quickstart: .venv/run
	$(BIN)/siglit quickstart

test: .venv/test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto

check: lint types imports test

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

.venv/run: pyproject.toml
	@echo "installing siglit and its packages into .venv (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/test: .venv/run
	$(PIP) -e '.[test]'
	touch $@
