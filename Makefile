# `make train`, `make test` and `make docs` do all the set-up there is, in a virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: train test check docs coverage third-party dist setup format clean

train: $(READY)  ## Train the small language model on two ranks; ARGS="--recipe.lr 2e-3" overrides.
	PATH="$(abspath $(BIN)):$$PATH" launch/accelerate.sh --config configs/train/small.yaml $(ARGS)

check: $(READY)  ## The inner loop: lint, format, strict types and quick unit tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/unit -m "not slow"

test: $(READY)  ## Lint, format, strict types, and every test.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

docs: $(READY)  ## Build the site into site/, strictly: a link, an anchor or a page that is missing is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

coverage: $(READY)  ## Lines that the unit tests run; those that only ranks run do not count.
	$(PYTEST) tests/unit --cov=dist_adamw --cov-report=term:skip-covered

third-party: $(READY)  ## Tests of Accelerate and torch with our optimizer and scheduler in place of theirs.
	$(BIN)/python -m tests.third_party $(ARGS)

dist: $(READY)  ## Build dist/*.tar.gz and dist/*.whl, and check them; the wheel is also installed on its own and tried.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	rm -rf build/wheel-venv
	$(BIN)/python -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	build/wheel-venv/bin/python tests/installed/check.py

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"dist_adamw needs Python 3.10 or newer, got {v.major}.{v.minor}. Run: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: install it (Debian: apt-get install python3-venv)." >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

format:
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
