# One virtual environment serves everything; its stamps say what has been installed into it, so a
# second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg pyproject.toml

.PHONY: help demo test lint types unit docs clean

help:
	@echo "make demo   set up and run the main job end to end on real images (about 5 minutes)"
	@echo "make test   set up and run lint, types and tests"
	@echo "make docs   build the documentation into build/site"
	@echo "make clean  remove what the two have made"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	@echo "installing fairclip_losses[demo] into $(VENV): PyTorch is several gigabytes, allow some minutes"
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	@echo "installing fairclip_losses[test] into $(VENV): PyTorch is several gigabytes, allow some minutes"
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo
	$(BIN)/python examples/digits/run.py

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test
	$(BIN)/python -m pytest

docs: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
