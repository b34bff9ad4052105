# Needs Python 3.11 or newer, git and make; everything else is installed into .venv from pinned hashes.
# `make` alone prints what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TREE ?= $(PATH_ARG)
PYTEST_ARGS ?=
# Most of a test run is waiting for leases, time limits and processes: twice as many at once as there are cores.
TEST_PROCESSES ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))

# What the acceptance tests and the benchmark call. The fleet itself needs none of it.
SYSTEM_PACKAGES := redis-server runc podman busybox-static skopeo buildah umoci docker-registry restic borgbackup zstd openssl age git

.PHONY: help install demo test test-fast lint bench-capture bench-restore bench-collect bench-prune bench-registry bench-redact bench-crash system-deps constraints hooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## the virtual environment in .venv, with everything pinned

# Hashes and an editable project do not mix in one pip call, so there are two.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found on PATH." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED) ## the main job on a real tree, start to finish (make demo TREE=dir)
	$(BIN)/mothball demo $(if $(TREE),"$(TREE)")

test: $(INSTALLED) ## every test: unit, integration, acceptance, chaos
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## unit and integration tests only
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "not acceptance and not chaos" $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff, mypy --strict, and the arrows between the packages
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench-capture: $(INSTALLED) ## capture beside tar, restic and borg (make bench-capture TREE=dir)
	$(BIN)/python -m benchmarks.capture $(if $(TREE),--tree "$(TREE)")

bench-restore: $(INSTALLED) ## restore beside tar, borg and restic; list, compare, verify (make bench-restore TREE=dir)
	$(BIN)/python -m benchmarks.restore $(if $(TREE),--tree "$(TREE)")

bench-collect: $(INSTALLED) ## collection beside rm -r, and its memory with a million blobs
	$(BIN)/python -m benchmarks.collect

bench-prune: $(INSTALLED) ## pruning a pull cache beside rm -rf and find, and its memory with a million blobs
	$(BIN)/python -m benchmarks.prune

bench-registry: $(INSTALLED) ## the registry from a thousand to a million records, and what a sweep costs among them
	$(BIN)/python -m benchmarks.registry

bench-redact: $(INSTALLED) ## finding and replacing secrets, MB/s of one core (make bench-redact TREE=dir)
	$(BIN)/python -m benchmarks.redact $(if $(TREE),--tree "$(TREE)")

bench-crash: $(INSTALLED) ## a crash report beside a first capture of the same tree (make bench-crash TREE=dir)
	$(BIN)/python -m benchmarks.crash $(if $(TREE),--tree "$(TREE)")

system-deps: ## the programs that acceptance tests and the benchmark use, with apt-get
	@if ! command -v apt-get >/dev/null; then \
		echo "No apt-get here. Install with this system's package manager what is missing of: $(SYSTEM_PACKAGES)" >&2; \
		echo "Tests that need a missing one are skipped." >&2; \
	else \
		as_root=""; [ "$$(id -u)" = 0 ] || as_root="sudo"; \
		missing=""; for p in $(SYSTEM_PACKAGES); do \
			dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
		if [ -z "$$missing" ]; then echo "all there: $(SYSTEM_PACKAGES)"; else \
			$$as_root apt-get update -qq; \
			$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi; \
	fi

constraints: ## pin all dependencies again (needs uv), for every platform and Python 3.11 to 3.14
	@command -v uv >/dev/null || { echo "make constraints needs uv (pip install uv)." >&2; exit 1; }
	uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --group build --generate-hashes \
		--no-emit-index-url --custom-compile-command "make constraints" --upgrade --quiet --output-file constraints.txt
	uv pip compile pyproject.toml --universal --python-version 3.11 --group build --generate-hashes --constraints constraints.txt \
		--no-emit-index-url --custom-compile-command "make constraints" --quiet --output-file deploy/docker/requirements.txt

hooks: $(INSTALLED) ## run the linters before every commit
	$(BIN)/pre-commit install

clean: ## remove the virtual environment, caches and results
	rm -rf $(VENV) .demo bench-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
