# One virtual environment serves everything; its stamps say what has been installed into it, so a
# second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg pyproject.toml

# The oldest releases that setup.cfg allows have an environment of their own.
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= $(PYTHON)

.PHONY: help demo evidence test lint types unit oldest upstream upstream-oldest docs clean

help:
	@echo "make demo      set up and run the main job end to end on real images (about 5 minutes)"
	@echo "make evidence  run the study of examples/evidence; it takes up where it stopped"
	@echo "make test      set up and run lint, types and tests, on the newest releases"
	@echo "make oldest    set up the oldest releases supported and run the tests on them"
	@echo "make upstream  run open_clip's own tests with the patch in force; upstream-oldest likewise"
	@echo "make docs      build the documentation into build/site"
	@echo "make clean     remove what these have made"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	@echo "installing fairclip_losses[demo] into $(VENV): PyTorch is several gigabytes, allow some minutes"
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	@echo "installing fairclip_losses[test] into $(VENV): PyTorch is several gigabytes, allow some minutes"
	$(BIN)/python -m pip install --quiet --editable '.[test,demo]'
	@touch $(VENV)/.demo $@

# The lower bounds of install_requires, as constraints for pip.
build/oldest.txt: setup.cfg
	@mkdir -p build
	sed -n '/^install_requires/,/^$$/s/^ *\(.*\)>=/\1==/p' setup.cfg > $@

$(OLDEST)/.test: build/oldest.txt pyproject.toml
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] > (3, 12) and \
	  "the oldest NumPy supported needs Python 3.10 to 3.12: make $(MAKECMDGOALS) OLDEST_PYTHON=python3.12")'
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	@echo "installing the oldest releases into $(OLDEST): PyTorch is several gigabytes, allow some minutes"
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[test]' --constraint build/oldest.txt
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/digits/run.py

evidence: $(VENV)/.test
	$(BIN)/python examples/evidence/study.py

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test
	$(BIN)/python -m pytest -n auto

oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python -m pytest -n auto -rs

upstream: $(VENV)/.test
	$(BIN)/python tests/upstream_tests.py

upstream-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python tests/upstream_tests.py

docs: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
