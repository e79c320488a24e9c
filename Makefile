# `make demo` and `make test` set themselves up; a fresh machine needs Python 3.11+, git, make and a
# C++ compiler. Choose the interpreter by `make PYTHON=python3.12 setup`; hand arguments on by ARGS.

PYTHON ?= python3
ARGS ?=
TORCH := 2.13.0

BIN := .venv/bin
READY := .venv/.ready
EVAL_READY := .venv/.ready-eval
KERNELS := $(shell find src -name '*.cpp' -o -name '*.h')
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow sanitize lint format docs bench lock clean

help:  ## show the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## make .venv with everything pinned by requirements.lock

demo: $(READY)  ## the main job, start to end, on a real model
	$(BIN)/deepseek demo $(ARGS)

test: $(READY)  ## the tests that every change must pass
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(EVAL_READY)  ## the slow and the many-process tests
	$(BIN)/python -m pytest -m "(slow or dist) and not gpu and not network" --durations-path tests/slow_durations.json $(ARGS)

sanitize: $(READY)  ## the kernels' tests on a build with address and undefined-behaviour checks
	@sh scripts/sanitize.sh $(ARGS)

lint: $(EVAL_READY)  ## style and types, of the optional libraries too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)  ## rewrite files in the one layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## regenerate the generated pages, then build site/ strictly
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

bench: $(READY)  ## measure this machine
	$(BIN)/python benchmarks/run.py $(ARGS)

lock: $(READY)  ## resolve requirements.lock afresh
	$(BIN)/python scripts/lock.py --torch $(TORCH)

clean:  ## forget the environment and everything built
	rm -rf .venv build dist site

# torch goes first, alone and pinned, so that no other package chooses it.
$(READY): pyproject.toml requirements.lock CMakeLists.txt $(KERNELS)
	@test -x $(BIN)/pip || PYTHON='$(PYTHON)' sh scripts/make-venv.sh
	@echo "Installing into .venv (minutes the first time) ..."
	@$(INSTALL) torch==$(TORCH)
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(EVAL_READY): $(READY)
	@$(INSTALL) --editable '.[dev,eval,executorch,preference]'
	@touch $@
