# make demo    the main job on its embedded default: calibrate, tune, train, compare, plot
# make test    the tests            make test ARGS="tests/video -k davis"
# make lint    ruff, mypy --strict, import-linter
# make docs    the documentation as a website, in site/; warnings are errors
# make bench   how fast the simulation is on this machine; make bench-parts, how long its parts take
# make format  let ruff mend what it can
# make venv    set up .venv and no more
# make clean   remove .venv, builds and caches (results of runs stay)
#
# Each sets up .venv first, from constraints.txt, and only when that or pyproject.toml changed.
#   PYTHON      interpreter to build .venv from, 3.11 or newer (default python3)
#   TORCH_ARGS  pip options for PyTorch alone, such as an --index-url with builds for another device
#   TASK        experiment that `make demo` runs (configs/experiment/TASK.yaml)
#   ARGS        further arguments of `make demo` and `make bench` (Hydra overrides), `make test` and `make bench-parts` (pytest) or `make docs` (MkDocs)

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint docs bench bench-parts format clean

PYTHON ?= python3
TORCH_ARGS ?=
TASK ?= demo
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -c constraints.txt
# pip's own chatter, cut to one line per package
BRIEF := awk '/^Collecting/ {name = $$2} /^ *Obtaining dependency information for/ {name = $$5} \
  name {sub(/[^A-Za-z0-9._-].*/, "", name); if (!seen[name]++) print "  [" ++n "] " name; name = ""} \
  /^ *Downloading/ && !/\.metadata/ || /^Installing/ || /^Successfully/ {print substr("  " $$0, 1, 100)} {fflush()}'

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is missing or older than Python 3.11 ($$($(PYTHON) --version 2>&1 | head -n 1));" \
	       "name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv (once; some minutes)"
	@$(PYTHON) -m venv .venv || { \
	  echo "error: cannot make .venv; install the venv module of $(PYTHON) (Debian: python3-venv)" >&2; exit 1; }
	@echo "1/2 PyTorch"
	@$(PIP) $(TORCH_ARGS) torch | $(BRIEF)
	@echo "2/2 resq-rl and its other dependencies"
	@$(PIP) -e ".[dev]" | $(BRIEF)
	@touch $@

venv: $(STAMP)

demo: $(STAMP)
	@$(BIN)/resq-rl compare +experiment=$(TASK) $(ARGS)

# Each process reads what another has compiled, also where the environment forbids Python to keep it.
test: $(STAMP)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses=4 --dist=loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy resq_rl hydra_plugins tests examples
	$(BIN)/lint-imports

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict $(ARGS)

bench: $(STAMP)
	@$(BIN)/resq-rl bench $(ARGS)

bench-parts: $(STAMP)
	@$(BIN)/python -m pytest benchmarks/parts.py -p pytest_benchmark.plugin --benchmark-columns=min,median,iqr,rounds $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find resq_rl envs policies configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
