# Everything runs in .venv, which `make setup` creates and keeps up to date.

PYTHON ?= python3
# Which PyTorch, and where it is looked for if pip as configured does not find it.
ifeq ($(shell uname -s),Darwin)
TORCH ?= torch==2.13.0
else
TORCH ?= torch==2.13.0+cpu
endif
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# `make serve PORT=9000 ARGS="--scheduler vllm"`, `make test ARGS="-k cli"`
PORT ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help setup serve test check

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  Variables: PORT=9000, ARGS="--scheduler vllm", PYTHON=python3.12, TORCH=torch==2.13.0'

setup: $(READY)  ## Create .venv with everything: the demo model and the test tools too

serve: setup  ## Serve the demo model; PORT= and ARGS= are passed on
	@$(BIN)/stallfree serve $(if $(PORT),--port $(PORT)) $(ARGS)

# In a process for each CPU, up to four, which take whole files. ARGS="-n 0" runs them in one.
test: setup  ## Run every test that a clean machine can run; ARGS= is passed to pytest
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  $(ARGS)

check: setup  ## Lint, formatting, strict types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_repository.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "stallfree needs Python 3.11 or later; $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing $(TORCH)"
	@said=$$(mktemp -d) || exit; trap 'rm -r "$$said"' EXIT; \
	$(PIP) '$(TORCH)' 2>"$$said/own" || \
	$(PIP) --extra-index-url $(TORCH_INDEX) '$(TORCH)' 2>"$$said/extra" || { \
	  echo "$(TORCH) cannot be installed. Of pip as it is configured:"; tail -n 3 "$$said/own"; \
	  echo "With $(TORCH_INDEX) beside it:"; tail -n 3 "$$said/extra"; \
	  echo "Name another index, or another PyTorch: make setup TORCH_INDEX=URL TORCH=torch==2.13.0"; \
	  exit 1; } >&2
	@echo "Installing stallfree, the demo model (0.5 GB) and the test tools"
	@$(PIP) --editable '.[demo,bench,test]'
	@touch $@
