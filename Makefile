# Every target does its own set-up and can be repeated; `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-sglang test test-sglang lint clean

VENV := .venv
VENV_SGLANG := .venv-sglang
EXAMPLES := examples/on_policy_distillation

# what a target starts finds this environment's programs first
# on a machine with GPUs too: what these targets prove is the CPU path
IN_VENV := CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=PASSIVE PYTHON="$(CURDIR)/$(VENV)/bin/python" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# the command line's SEED=n reaches the quickstarts; without it their own default holds
ifdef SEED
export SEED
endif

TYPED := $(strip opd_megatron $(wildcard train.py tools/*.py benchmarks/*.py))
LINT := 'ruff check .' 'ruff format --check .' 'mypy $(TYPED)' 'lint-imports --no-logo'

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## build .venv with the pinned packages (PYTHON=... chooses the interpreter, 3.11 or newer)
	@tools/setup_venv.sh $(VENV)

quickstart: setup ## teach a small student on this machine and draw its learning curve (SEED=n)
	@echo "==> quickstart"
	@$(IN_VENV) $(EXAMPLES)/quickstart/run.sh

quickstart-sglang: setup $(VENV_SGLANG) ## the quickstart with real SGLang servers as teacher and rollout engine (SEED=n)
	@echo "==> quickstart with an SGLang teacher and SGLang rollouts"
	@$(IN_VENV) $(EXAMPLES)/quickstart-sglang/run.sh

test: setup ## lint, types, import rules and all tests that need no SGLang
	@$(IN_VENV) .ci/parts $(LINT) 'pytest tests --ignore=tests/sglang'

test-sglang: setup $(VENV_SGLANG) ## tests against the real SGLang server on the CPU
	@$(IN_VENV) .ci/parts 'pytest tests/sglang'

lint: setup ## lint, types and import rules alone
	@$(IN_VENV) .ci/parts $(LINT)

clean: ## remove caches and build products (runs/ and the environments stay)
	@echo "==> removing caches and build products"
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find . -path './.venv*' -prune -o -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: $(VENV_SGLANG)
$(VENV_SGLANG):
	@echo "==> SGLang for the CPU in $@"
	@tools/sglang_cpu/install.sh $@
