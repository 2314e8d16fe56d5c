# Every target makes the environment it needs in .venv; all that has to be there is Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check test-slow bench docs
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(BIN)/vanishing demo

test: check
	$(BIN)/pytest -n 2

check: $(VENV)/.dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-slow: $(VENV)/.dev-installed
	$(BIN)/pytest -m slow

bench: $(VENV)/.dev-installed
	$(BIN)/python benchmarks/step_time.py

# Into site/; any warning is an error. The variable is for the theme, which announces its successor at every start.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -W error -m mkdocs build --strict

# A stamp a set of dependencies: an install is redone only when pyproject.toml changes.
$(VENV)/.%-installed: pyproject.toml | $(BIN)/python
	@echo "Installing vanishing[$*] into $(VENV) (PyTorch is large: minutes the first time)"
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vanishing needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
