# make demo, make test: each does all the set-up, then its job. make lint, make bench.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test bench lint clean
demo: $(VENV)/ready
	$(BIN)/python -m cbloss_fused.demo
test: $(VENV)/ready
	$(BIN)/python -m pytest
bench: $(VENV)/ready $(VENV)/bench
	$(BIN)/python -m bench.run
lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')
clean:
	rm -rf $(VENV) build dist *.egg-info cbloss_fused/_C*.so

# The environment, torch, then the extension, built against that torch and in place.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel
	touch $@
$(VENV)/ready: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,demo]"
	touch $@
$(VENV)/bench: $(VENV)/ready
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@
$(VENV)/lint: $(VENV)/torch
	$(BIN)/pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@
