# `make demo`, `make train-demo` and `make test` need only Python 3.11 or newer and make: each builds .venv once, with the
# versions in constraints.txt, and reuses it until that file or setup.cfg changes.
# Elsewhere: PYTHON=/path/to/python3.12 make test, VENV=/some/folder make test.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
# 2 workers: every worker compiles its own programs and may hold a model, so more cost memory before they save time
PYTEST_ARGS ?= -n 2
# the TPU compiler that the recorded figures are of
LIBTPU ?= libtpu==0.0.51
ZIGLANG ?= ziglang==0.17.0

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VERSIONS ?= -c constraints.txt
# setuptools first and by hand: an isolated build would take its newest
install = $(PIP) $(VERSIONS) setuptools && $(PIP) $(VERSIONS) --no-build-isolation -e ".$(EXTRAS)"

.PHONY: help demo train-demo test test-slow test-newest lint lock bench tpu-check tpu-table clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base  ## answer a question with the default model (needs only the base install)
	$(BIN)/qwen-jax demo

train-demo: $(VENV)/.train  ## train a small Qwen from scratch, draw its loss and let it write
	test -d runs/tokenizer || $(BIN)/qwen-jax data tokenizer corpus:english corpus:python --vocab-size 2048 --out runs/tokenizer
	$(BIN)/qwen-jax train pretrain_tiny
	$(BIN)/qwen-jax generate --model runs/pretrain_tiny/final --max-tokens 120 --temperature 0.7 --top-p 0.9 \
		"And the king said unto" "The for statement is used to" "In the beginning"
	@echo "weights: runs/pretrain_tiny/final; loss curves: runs/pretrain_tiny/curves.png; the data: docs/data.md"

test: $(VENV)/.dev  ## run the tests, the checks against PyTorch among them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## run the tests that take minutes
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

test-newest:  ## run the tests with the newest releases that setup.cfg admits, in an environment of its own
	rm -f $(VENV)-newest/.dev
	$(MAKE) test VENV=$(VENV)-newest VERSIONS="--upgrade --upgrade-strategy eager"

lock: $(VENV)/uv  ## renew constraints.txt, for every Python that setup.cfg admits, and run the tests with it
	echo setuptools | $</bin/uv pip compile --quiet --python $(BIN)/python --upgrade --universal --python-version 3.11 \
		--no-annotate --custom-compile-command "make lock" --extra train --extra dev --extra torch --extra serve -o constraints.txt setup.cfg -
	$(MAKE) test

lint: $(VENV)/.dev  ## format, style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## measure beside peers, one table
	$(BIN)/python -m bench.cpu

tpu-check: $(VENV)/.dev $(VENV)/tpu  ## compile for TPUs that are not here, and compare memory and traffic with the record
	PYTHONPATH=$(VENV)/tpu $(BIN)/python -m pytest -v -m slow tests/aot/test_tpu.py

tpu-table: $(VENV)/.dev $(VENV)/tpu  ## print the table of docs/tpu.md; half an hour on one core, kept once compiled
	PYTHONPATH=$(VENV)/tpu $(BIN)/qwen-jax compile --table

clean:  ## remove the environment and every cache
	rm -rf $(VENV) $(VENV)-newest build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python=; for candidate in $(PYTHON) python3.12 python3.13 python3.11 python3 python; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "qwen-jax needs Python 3.11 or newer and none was found; install one, or name it: PYTHON=/path/to/python make ..." >&2; exit 2; \
	fi; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); echo "$$python cannot make a virtual environment; install its venv module (on Debian and Ubuntu: python3-venv)." >&2; exit 2; }

$(VENV)/.base: EXTRAS =
$(VENV)/.base: setup.cfg constraints.txt | $(BIN)/python
	$(install)
	@# a compiler for the C kernels (--dtype int8), 100 MB, where there is none; without it int8 is bfloat16
	@command -v cc gcc clang >/dev/null || $(PIP) --no-deps $(ZIGLANG) || true
	@touch $@

$(VENV)/.train: EXTRAS = [train]
$(VENV)/.train: setup.cfg constraints.txt | $(BIN)/python
	$(install)
	@touch $@ $(VENV)/.base

$(VENV)/.dev: EXTRAS = [dev,torch,train,serve]
$(VENV)/.dev: setup.cfg constraints.txt | $(BIN)/python
	$(install)
	@touch $@ $(VENV)/.base $(VENV)/.train

$(VENV)/uv: | $(BIN)/python
	$(PIP) --target $@ uv

# beside the environment, not in it: where libtpu is installed, jax looks for a TPU at every start
$(VENV)/tpu: | $(BIN)/python
	$(PIP) --no-deps --target $@ $(LIBTPU)
