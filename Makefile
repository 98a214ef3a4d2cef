# `make` lists the targets. ARGS="..." is passed on to the program that a target runs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,experiments,lint
# What pip takes for torch, such as a wheel. Else it takes its default, which on Linux is the build for CUDA, of several
# GB; a torch that is in .venv already stays.
TORCH ?=
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
COMMA := ,
# What a target needs beside the package, by the names of extras in pyproject.toml.
with = $(VENV)/.built $(patsubst %,$(VENV)/.with-%,$(subst $(COMMA), ,$(1)))
NATIVE := $(shell find csrc 2>/dev/null)
CXX_FILES = $(shell find csrc tests experiments -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Without a GPU the environment leaves the CUDA module out, which takes minutes to compile; `cuda-check` compiles it.
export OPTIM8_CUDA ?= $(if $(wildcard /dev/nvidia* /dev/dxg),,0)
# What is built here is what is developed here: no warning passes.
export OPTIM8_WERROR ?= 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' Makefile

.PHONY: env
env: $(call with,$(EXTRAS)) ## make .venv, with the package in it (editable) and what tests, experiments and lint need

$(VENV)/.python: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make env: constraints.txt is for Python 3.11 \
	and newer, $(PYTHON) is " + sys.version.split()[0] + ". Name another: make env PYTHON=python3.12")'
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11 ninja $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Without the package itself, which need not be built again for each.
$(VENV)/.with-%: $(VENV)/.installed
	@$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*extras["$*"], sep="\n")' > $@.txt
	$(PIP) --requirement $@.txt
	@touch $@

.PHONY: demo
demo: $(call with,experiments) ## train a small GPT with AdamW, AdamW8bit and Lion8bit side by side
	$(BIN)/python experiments/train_lm.py $(ARGS)

# At most four at a time, each with its share of the processors. A file stays together: its tests share what is costly.
PYTEST := $(BIN)/pytest --quiet --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
.PHONY: test
test: $(call with,test,experiments) ## run the tests and the examples in docstrings
	$(PYTEST) --doctest-modules optim8 tests $(ARGS)

.PHONY: test-pythons
test-pythons: ## run the tests on each Python here, in environments of their own (ARGS=--help)
	@$(PYTHON) tests/pythons.py $(ARGS)

.PHONY: wheels
wheels: ## build a wheel for each Python here into dist/, and try it (ARGS=--help)
	@$(PYTHON) tests/wheels.py $(ARGS)

# The package goes to a folder of its own, so a sanitized module never mixes with the normal one. Leaks are not looked
# for: CPython and torch keep what they allocate. libstdc++ is preloaded so that AddressSanitizer finds its throw.
SANITIZED := build/sanitized
NATIVE_TESTS = tests/test_codec.py $(wildcard tests/functional/test_*.py tests/numerics/test_*.py tests/optim/test_*.py \
    tests/checkpoint/test_optim_*.py tests/paging/test_paging_disk*.py tests/paging/test_paging_step*.py)
# What torch.compile makes runs a compiler, which would be sanitized with it.
SANITIZED_TESTS = $(filter-out tests/optim/test_optim_training.py tests/functional/test_functional_peers.py \
    tests/optim/test_optim_compile.py tests/optim/test_optim_compile_limits.py, $(NATIVE_TESTS)) \
    tests/install/test_install.py::test_the_tests_run_against_the_build_that_was_asked_for
.PHONY: test-sanitize
test-sanitize: $(call with,test) ## run the tests of native CPU code under AddressSanitizer and UndefinedBehaviorSanitizer
	OPTIM8_CUDA=0 OPTIM8_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(SANITIZED) OPTIM8_TESTED_PACKAGE=$(SANITIZED) OPTIM8_TEST_FORMS=1 \
	$(PYTEST) -m "not slow" $(SANITIZED_TESTS) $(ARGS)

.PHONY: lint
lint: $(call with,test,experiments,lint) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python experiments/report.py --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

.PHONY: format
format: $(call with,lint) ## bring all files into the style that lint checks
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: bench
bench: $(call with,experiments,peers) ## measure the optimizer step against torch and the peers
	$(BIN)/python experiments/bench_step.py $(ARGS)

.PHONY: report
report: $(call with,experiments) ## render the tables and pictures of README.md and docs from experiments/results
	$(BIN)/python experiments/report.py $(ARGS)

.PHONY: docs
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(call with,docs) ## build the site of the documents and of the API into build/site; a broken link fails
	$(BIN)/mkdocs build --strict $(ARGS)
	@echo "open build/site/index.html, or with its search: $(BIN)/python -m http.server --directory build/site"

.PHONY: cuda-check
cuda-check: $(call with,test) ## compile the CUDA module (needs nvcc, no GPU), import it, run its PTX on the CPU
	OPTIM8_CUDA=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/cuda-check
	$(BIN)/python -c 'import sys; sys.path.insert(0, "build/cuda-check/optim8"); import _cuda; print("imported", _cuda.__file__)'
	OPTIM8_CUDA_OBJECTS=build/native/_cuda $(BIN)/pytest --quiet --numprocesses 2 tests/cuda/test_cuda_ptx.py $(ARGS)

# Runs on the Python it is given: no network and no environment of its own there.
.PHONY: gpu-report
gpu-report: export OPTIM8_WERROR = 0
gpu-report: ## on a machine with a GPU, in 9 minutes: build, check, measure, test (ARGS=--help); needs torch, pybind11, ninja
	$(PYTHON) experiments/gpu_report.py $(ARGS)

.PHONY: clean
clean: ## remove what was built and cached; keeps .venv
	rm -rf build dist *.egg-info optim8/*.so $(VENV)/.built .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
