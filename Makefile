# make demo, make test: each does all the set-up, then its job. Also make bench, make codegen, make lint.
# make gpu: on a machine with a GPU, with its own Python, torch and triton; downloads nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
KERNEL_TESTS := $(addprefix tests/test_,autograd.py edge.py finite.py layouts.py kernels.py modules.py oracle.py triton.py)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test bench codegen roofline gpu gpu-test gpu-bench lint clean
demo: $(VENV)/ready
	$(BIN)/python -m cbloss_fused.demo
test: $(VENV)/ready
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(KERNEL_TESTS)
bench: $(VENV)/ready $(VENV)/bench
	$(BIN)/python -m bench.run
codegen: $(VENV)/ready $(VENV)/bench
	$(BIN)/python -m bench.codegen
	$(BIN)/python -m bench.launch_cost
roofline: $(VENV)/ready
	$(BIN)/python -m bench.roofline > bench/roofline.md
gpu:
	status=0; $(MAKE) gpu-test || status=1; $(MAKE) gpu-bench || status=1; exit $$status
gpu-test:
	$(PYTHON) -m pytest -o addopts= -q $(KERNEL_TESTS)
gpu-bench:
	$(PYTHON) -m bench.gpu
lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')
clean:
	rm -rf $(VENV) build dist *.egg-info cbloss_fused/_C*.so

# The environment, torch, then the extension, built against that torch and in place.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel
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
