# `make demo` and `make test` need only make and a Python >= 3.12; `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-eval test-gpu lint types format clean
export PYTHON ACCELERATOR

WORKERS ?= 2
ARGS ?=
BIN := .venv/bin
PACKAGES := teal_jax pallas_kernels converters

help: ## this list
	@echo "make TARGET [PYTHON=python3.12] [ACCELERATOR=cpu|cuda12|cuda13] [ARGS=...]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

venv: ## .venv with the pinned dependencies (CUDA ones where there is an NVIDIA GPU)
	@sh scripts/make_venv.sh

demo: venv ## import, sparsify, compare and talk with the embedded model (ARGS: options of `teal demo`)
	$(BIN)/teal demo $(ARGS)

test: lint types ## lint, types and the whole CPU test suite
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: venv ## the CPU test suite without the slow tests
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-eval: venv ## the tests that need the extra eval (lm-evaluation-harness), which is installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[eval]"
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(WORKERS) --dist worksteal tests/teal_jax/harness $(ARGS)

test-gpu: venv ## the test suite on the CUDA device
	TEAL_TEST_GPU=1 $(BIN)/pytest $(ARGS)

lint: venv ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv ## ty
	$(BIN)/ty check --python .venv $(PACKAGES)

format: venv ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything made
	rm -rf .venv build dist .pytest_cache .ruff_cache teal-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
