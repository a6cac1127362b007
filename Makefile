# Every target sets up what it needs (see tools/bootstrap.py); later runs reuse it.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(BIN)/python
PRESET ?= cpu
WORKERS ?= 2

.PHONY: help setup check test test-core test-host demo bench miniature golden evaluate ablations clean

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 - /p' $(MAKEFILE_LIST) | sed 's/ - /\t/' | expand -t 20

setup: ## .venv, the pinned packages, ComfyUI
	@$(PYTHON) tools/bootstrap.py

check: setup ## rules and format (ruff), types (basedpyright)
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	@$(RUN) -m basedpyright

test: check ## all tests; in WORKERS=2 processes; ARGS="-k name" is passed to pytest
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --durations 10 tests $(ARGS)

test-core: setup ## the core's tests alone: no ComfyUI, no browser, no training
	$(BIN)/pytest -q -n $(WORKERS) tests/core $(ARGS)

test-host: ## the tests of the nodes in another ComfyUI: HOST=folder, or a pinned version; a .venv of its own
	@$(PYTHON) tools/test_host.py "$(HOST)" $(ARGS)

demo: setup ## a turntable from a portrait through real ComfyUI; PORTRAIT=file PORT=number
	@$(RUN) -m tools.demo $(if $(PORTRAIT),--portrait "$(PORTRAIT)") $(if $(PORT),--port $(PORT)) $(ARGS)

miniature: setup ## train the miniature of the whole system; PRESET=cpu|gpu
	@$(RUN) -m training.miniature --preset $(PRESET) $(ARGS)

bench: setup ## what a guided step costs: seconds, kernels, bytes, FLOPs, memory
	@$(RUN) -m evaluation.bench $(ARGS)

golden: setup ## every golden number, by the core and through ComfyUI
	@$(RUN) -m evaluation.golden $(ARGS)

evaluate: setup ## the miniature on held-out identities
	@$(RUN) -m evaluation.miniature $(ARGS)

ablations: setup ## the paper's ablations on held-out identities, into runs/; WORKERS=2 processes
	@$(RUN) -m evaluation.ablations --workers $(WORKERS) $(ARGS)

clean: ## remove what setup and the tools made, except .cache, runs and outputs
	rm -rf .venv .host .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
