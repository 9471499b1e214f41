# Every target makes what it needs; `make` alone lists them.
#   PYTHON=python3.12  the interpreter for .venv     TORCH='torch==...'  another build of torch (see .ci/install)
PYTHON ?= python3
TORCH ?=
export PYTHON TORCH

BIN := .venv/bin
CODE := cluster launcher runtime slurm strategies tests examples benchmarks
# Tests wait more than they compute, whole runs above all: three at once keep two cores busy.
JOBS ?= 3

.PHONY: help install demo test unit e2e check check-style check-tests bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: ## .venv with everything that the tests need; quick when nothing changed
	@.ci/install

demo: ## the main job: 2 nodes on this machine train a byte-level GPT; installs no more than it needs
	@.ci/install base
	$(BIN)/dtrain launch examples/gpt.yaml

test: install ## all tests, JOBS at once; file by file, because a file's tests share the servers that they start
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

unit: install ## unit tests only
	$(BIN)/pytest -m "not e2e" -n $(JOBS)

e2e: install ## whole runs only
	$(BIN)/pytest -m e2e -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: install ## lint, format, types and the quick unit tests, in under two minutes
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target check-style check-tests

check-style: # beside the tests, which wait more than they compute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-tests:
	$(BIN)/pytest -m "not e2e and not slow" -n $(JOBS) -q

bench: install ## the benchmarks, one after the other (minutes; quiet machine)
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## removes .venv, caches and builds; runs/ stays, it may be somebody's work
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
