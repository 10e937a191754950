# SPDX-License-Identifier: BSD-3-Clause
#
#   make demo    train a small language model on one long real document, sharded over a ring
#   make test    build and run every test
#   make check   formatting, lint, types
#   make bench   the benchmarks, in a few minutes
#   make clean   remove what the others made
#
# Each one does its own set-up (virtual environment, PyTorch, build) and is quick the second time.
# Settings: PYTHON=python3.12, TORCH="torch==2.11.0", VENV=.venv

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch>=2.11
VENV ?= .venv
GXX_LEAST = 11
CXX := $(if $(filter default,$(origin CXX)),g++,$(CXX))
export CXX

BIN = $(VENV)/bin
NATIVE = setup.py pyproject.toml $(shell find csrc -type f)
FORMATTED = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test check bench clean prerequisites
.DELETE_ON_ERROR:

# --check first: bad arguments get one clear error instead of torchrun's report.
demo: $(VENV)/built
	@$(BIN)/python examples/train.py --check $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/train.py $(ARGS)

test: $(VENV)/built
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/built
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/built
	$(BIN)/python benchmarks/kernel.py
	$(BIN)/python benchmarks/ring.py

clean:
	rm -rf $(VENV) build dist demo *.egg-info ring_attention/*.so

# The venv is made for one torch; asking for another one makes it anew.
$(VENV)/torch: | prerequisites
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/tools: pyproject.toml $(VENV)/torch
	$(BIN)/python -c 'import tomllib; e = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	    print("\n".join(e["dev"] + e["demo"]))' > $(VENV)/tools.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/tools.txt
	touch $@

$(VENV)/built: $(NATIVE) $(VENV)/tools
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

prerequisites:
	@test -n "$(PYTHON)" || { echo "make: Python >= 3.11 is missing; on Debian or Ubuntu: apt install python3 python3-dev python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	    { echo "make: the headers of $(PYTHON) (Python.h) are missing; on Debian or Ubuntu: apt install python3-dev"; exit 1; }
	@command -v $(CXX) >/dev/null || \
	    { echo "make: the compiler $(CXX) is missing (g++ >= $(GXX_LEAST)); on Debian or Ubuntu: apt install g++"; exit 1; }
	@case "$(CXX)" in *g++*) test "$$($(CXX) -dumpversion | cut -d. -f1)" -ge $(GXX_LEAST) || \
	    { echo "make: $(CXX) is $$($(CXX) -dumpversion), g++ >= $(GXX_LEAST) is needed; on Debian or Ubuntu: apt install g++"; exit 1; };; esac
