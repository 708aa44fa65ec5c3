# Penstock: `make demo` and `make test` do all set-up on a fresh machine. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers suit the smallest machine that this is tested on (2 cores).
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo up test test-unit test-clients test-chaos test-training test-soak test-performance bench bench-quick bench-scheduler check format protos sync clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(STAMP): pyproject.toml deploy/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment (Debian: apt install python3-venv), or set PYTHON=…" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)…"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Install, start the mesh, train, push, serve, update and roll back real models
	@$(BIN)/penstock demo

up: $(STAMP) ## Start the mesh on this machine and stay with it
	@$(BIN)/penstock up

test: $(STAMP) ## All tests but third-party clients, chaos and benchmarks
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not clients and not chaos and not performance and not training and not gpu"

test-clients: $(STAMP) ## Unmodified third-party clients against a running mesh
	$(BIN)/python -m pytest -m clients tests/clients

test-chaos: $(STAMP) ## Kills, cuts and pauses under load
	$(BIN)/python -m pytest -m chaos tests/chaos

test-training: $(STAMP) ## Real models trained, converted and compressed to a stated quality
	$(BIN)/python -m pytest -m training tests

test-soak: $(STAMP) ## Ten minutes of mixed load, after which nothing may have grown
	PENSTOCK_SOAK_SECONDS=$${PENSTOCK_SOAK_SECONDS:-600} $(BIN)/python -m pytest -m chaos -s tests/chaos/test_soak.py

test-performance: $(STAMP) ## Figures of ours alone that must hold: overload, many deployments on two processors
	$(BIN)/python -m pytest -m performance -s tests/performance

bench: $(STAMP) ## Speed beside floors and peers: BENCH="--peers ours,triton --seconds 5" chooses
	PYTHONPATH=tests $(BIN)/python -m performance $(BENCH)

bench-quick: $(STAMP) ## The same in two minutes: ours, Triton, Mosec and a floor
	PYTHONPATH=tests $(BIN)/python -m performance --quick $(BENCH)

bench-scheduler: $(STAMP) ## The planner on 10,000 simulated nodes, and 1,000 small clusters with faults
	PYTHONPATH=tests $(BIN)/python -m performance.simulation $(BENCH)

# Of low severity ruff's S rules see more than bandit, each exception with its reason beside it.
check: $(STAMP) ## Format, lint, types, arrows, protos, blocking client, security
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy protos/generate.py libs/make_sync.py
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python protos/generate.py --check
	$(BIN)/python libs/make_sync.py --check
	$(BIN)/bandit -q -ll -r libs services deploy
	@bash deploy/audit.sh $(BIN)

format: $(STAMP) ## Write the format that check asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format -w

protos: $(STAMP) ## Write the stubs anew from protos/
	$(BIN)/python protos/generate.py

sync: $(STAMP) ## Write the blocking client anew from the asyncio one
	$(BIN)/python libs/make_sync.py

clean: ## Remove what the targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .clients .bench dist build
