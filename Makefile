# `make demo` and `make test` work on a fresh machine: all they need is Python 3.11 or later and make.

PYTHON ?= python3
BIN := .venv/bin

# Nothing asks for an account or reports home unless the caller says so: `WANDB_MODE=online make demo`.
export RAY_USAGE_STATS_ENABLED ?= 0
export WANDB_MODE ?= offline
export WANDB_SILENT ?= true

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: leaderboard-env help setup demo test test-slow test-cluster lint bench clean

help:
	@echo "make setup   create .venv and install what is pinned in constraints.txt"
	@echo "make demo    the whole pipeline on this machine, in minutes; ends with where the report is"
	@echo "make test    lint, then every test that takes seconds and needs no GPU (ARGS='-k name' is passed to pytest)"
	@echo "make test-slow   the tests that take longer: the whole demo, 10,000 files, machine code of the U-Net"
	@echo "make test-cluster   three hosts on this machine as a cluster over SSH (root, Debian or Ubuntu)"
	@echo "make lint    ruff, mypy, import-linter, codespell"
	@echo "make bench   the benchmarks"
	@echo "make leaderboard-env   an environment with sbi and torchcfm for experiments/benchmarks/leaderboard.py --peers"
	@echo "make clean   remove caches and build leftovers (never data/, runs/ or .venv/)"

setup: .venv/.installed

# The stamp makes this run again only when what to install has changed.
.venv/.installed: setup.cfg pyproject.toml constraints.txt configs/cluster/install.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "invdyn needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	         "Install one and run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
	    echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing torch, invdyn and its dependencies into .venv (once; this takes minutes) ..."
	@bash configs/cluster/install.sh .venv test,lint,export
	@touch $@

demo: setup
	$(BIN)/python experiments/demo.py

# Two processes, each with a Ray of its own: most tests leave a core idle. All tests of a file run in one of them.
test: lint
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2 --dist loadfile)
	$(if $(ARGS),,$(BIN)/python -m pytest tests --ignore tests/cluster -m cluster)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

# Three hosts on this machine, over SSH. Without root it skips and says so.
test-cluster: setup
	@export PATH="$$PATH:/usr/sbin:/sbin"; \
	    { command -v sshd && command -v ip && command -v rsync && command -v curl; } >/dev/null || \
	    [ "$$(id -u)" != 0 ] || { apt-get -qq update && apt-get -qq install -y openssh-server iproute2 rsync curl; }
	$(BIN)/python -m pytest tests/cluster -m cluster -rs $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: setup
	$(BIN)/python experiments/benchmarks/run.py

# The peers of the leaderboard pin other versions than invdyn may: they get an environment of their own, with the same torch.
leaderboard-env:
	@test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	.venv-peers/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)" sbi==0.27.0 torchcfm==1.0.7

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find invdyn experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
