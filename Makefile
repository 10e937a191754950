# SPDX-License-Identifier: BSD-3-Clause
#
#   make demo    train a small language model on one long real document, sharded over a ring
#   make test    build and run every test
#   make check   formatting, lint, types
#   make bench   the benchmarks, in a few minutes
#   make clean   remove what the others made
#   make sanitize   the tests of the operators under AddressSanitizer and UBSan, in a build of its own
#   make emulated   the same tests of the AVX-512 and AMX kernels where only AVX2 is, their instructions emulated
#   make cuda    compile the CUDA operators for every GPU, check what the compiler made of them
#   make vm      run the CUDA kernels without a GPU: their PTX, interpreted, under the operators' tests
#   make vm-full the same for every parameter and five seeds; half an hour with -j2
#   make gpu     run the same tests, and those of NCCL and captured graphs, on a GPU
#   make mutants how many single changes of the CUDA kernels those tests notice; an hour
#   make calibrate   run FlashAttention-2 and a CUTLASS example on that interpreter
#
# Each one does its own set-up (virtual environment, PyTorch, build) and is quick the second time.
# Settings: PYTHON=python3.12, TORCH="torch==2.11.0", VENV=.venv, CUDA=1 (demo, test and bench build
# the CUDA operators too: minutes, and not needed without a GPU)

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch>=2.11
VENV ?= .venv
CUDA ?= 0
GXX_LEAST = 11
CXX := $(if $(filter default,$(origin CXX)),g++,$(CXX))
export CXX

BIN = $(VENV)/bin
NATIVE = setup.py pyproject.toml $(shell find csrc -type f)
FORMATTED = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))

# PYTHONSAFEPATH keeps this folder, and so the ordinary build, off Python's path. Python itself is not
# sanitized: ASan must be loaded ahead of it, and libstdc++ with it, whose throw it wraps. Of leaks
# Python and torch have many.
SANITIZED = build/sanitize
SANITIZERS_ON = PYTHONPATH=$(SANITIZED)/lib PYTHONSAFEPATH=1 \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so.6)"
# --capture=sys: a report is the last thing a process writes, and pytest must not be holding it.
SANITIZED_TESTS = $(BIN)/python -m pytest --capture=sys -p no:cacheprovider tests/test_ops*.py
# test_isa: captures what its processes write, and waits 280 s for them; a loop does its work.
UNSANITIZED = --deselect 'tests/test_ops_isa.py::test_isa'

# A build whose rows of AVX-512 and AMX run on AVX2, see tests/emulated_isa. float64 is the portable
# row's everywhere, and all but bfloat16 is the AVX-512 row's in the other two: once is enough.
EMULATED = build/emulated
ON_EMULATED = PYTHONPATH=$(EMULATED)/lib PYTHONSAFEPATH=1
# Not where the processor has AVX-512: test_isa runs that row, in `make test`.
NATIVE_AVX512 := $(shell grep -w -m 1 avx512f /proc/cpuinfo 2> /dev/null)
EMULATED_TESTS = $(BIN)/python -m pytest -p no:cacheprovider tests/test_ops*.py -m isa

# The CUDA operators for every GPU, and the compiler's report on each kernel.
CUDA_BUILD = build/cuda
# A build whose ISA table has the rows ptx-sm80 and ptx-sm90 (Hopper; of its own kernels, none of which
# is for fp32, the operators' tests alone), see tests/ptxvm. Its kernels: 1 compiles PTX alone,
# half the work of every GPU, which is what one wants after a change; build/cuda links the objects
# of `make cuda`, which hold the PTX too, so that nvcc runs once for both.
VM = build/ptxvm
PTXVM ?= 1
ON_VM = RING_ATTENTION_CPU=ptx-sm80 PYTHONPATH=$(VM)/lib PYTHONSAFEPATH=1
ON_HOPPER = $(ON_VM) RING_ATTENTION_CPU=ptx-sm90
VM_TESTS = $(BIN)/python -m pytest -p no:cacheprovider tests/test_ops*.py tests/test_ring.py \
    tests/test_invariant.py tests/test_ptx_counts.py -m "isa or vm"
HOPPER_CHOICE = -k "not float32"
HOPPER_TESTS = $(BIN)/python -m pytest -p no:cacheprovider tests/test_ops*.py -m "isa or vm" $(HOPPER_CHOICE)
# The runs of vm-full, SEED-KIB (227: Hopper) and one with the other backward: a log each, of those
# that passed.
FULL = $(VM)/full
SEEDS ?= 1 2 3 4 5
FULL_LOGS = $(foreach kib,163 99 227,$(SEEDS:%=$(FULL)/%-$(kib).log)) $(FULL)/atomic.log
TESTED = $(NATIVE) $(shell find ring_attention tests -name '*.py' -o -path 'tests/ptxvm/*' -name '*.[ch]*')

.PHONY: demo test check sanitize emulated cuda cuda-build vm vm-full vm-build gpu mutants calibrate bench clean prerequisites
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

sanitize: $(VENV)/built
	RING_ATTENTION_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(SANITIZERS_ON) $(BIN)/python -c 'from ring_attention import ops; print(*ops.isa_names()); \
	    assert "/$(SANITIZED)/" in ops.__file__, ops.__file__' > $(SANITIZED)/isas
	$(SANITIZERS_ON) $(SANITIZED_TESTS) -m "not isa" $(UNSANITIZED) $(ARGS)
	for isa in $$(cat $(SANITIZED)/isas); do echo "RING_ATTENTION_CPU=$$isa"; \
	    $(SANITIZERS_ON) RING_ATTENTION_CPU=$$isa $(SANITIZED_TESTS) -m isa $(ARGS) || exit 1; done

ifeq ($(shell grep -w -m 1 avx2 /proc/cpuinfo 2> /dev/null),)
emulated:
	@echo "make $@: skipped, this machine's processor has no AVX2"
else
emulated: $(VENV)/built
	RING_ATTENTION_CUDA=0 RING_ATTENTION_EMULATED=1 $(BIN)/python setup.py --quiet build \
	    --build-base $(EMULATED) --build-lib $(EMULATED)/lib
	$(ON_EMULATED) $(BIN)/python -m pytest -p no:cacheprovider tests/test_emulated_isa.py
	$(if $(NATIVE_AVX512),@echo "avx512: make test runs it on this processor",$(ON_EMULATED) RING_ATTENTION_CPU=avx512 \
	    $(EMULATED_TESTS) -k "not float64" $(ARGS))
	$(ON_EMULATED) RING_ATTENTION_CPU=avx512_bf16 $(EMULATED_TESTS) -k "bfloat16 or not float" $(ARGS)
	$(ON_EMULATED) RING_ATTENTION_CPU=amx $(EMULATED_TESTS) -k "bfloat16 or not float" $(ARGS)
endif

# On a GPU: a build with CUDA of its own, since the others need not have it.
GPU = build/gpu
GPU_TESTS = tests/test_ops*.py tests/test_ring.py tests/test_invariant.py tests/test_cuda.py -m "isa or vm or gpu"

ifeq ($(shell command -v nvidia-smi),)
gpu:
	@echo "make $@: skipped, there is no nvidia-smi, so no driver of a GPU"
else
gpu: $(VENV)/built
	RING_ATTENTION_CUDA=1 $(BIN)/python setup.py --quiet build --build-base $(GPU) --build-lib $(GPU)/lib
	RING_ATTENTION_TEST_DEVICE=cuda PYTHONPATH=$(GPU)/lib PYTHONSAFEPATH=1 \
	    $(BIN)/python -m pytest -p no:cacheprovider $(GPU_TESTS) $(ARGS)
endif

ifeq ($(NVCC),)
cuda vm vm-full mutants calibrate:
	@echo "make $@: skipped, there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
else
cuda: cuda-build
	$(BIN)/python -m pytest tests/test_cuda_build.py $(ARGS)

# The log is added to, since only what has changed is compiled: the last word on a kernel counts.
cuda-build: $(VENV)/built
	@mkdir -p $(CUDA_BUILD)
	RING_ATTENTION_CUDA=only $(BIN)/python setup.py --quiet build --build-base $(CUDA_BUILD) --build-lib $(CUDA_BUILD)/lib \
	    >> $(CUDA_BUILD)/log 2>&1 || { tail -n 40 $(CUDA_BUILD)/log; exit 1; }

vm: vm-build
	$(ON_VM) $(VM_TESTS) $(ARGS)
	$(ON_HOPPER) $(HOPPER_TESTS) $(ARGS)
	$(BIN)/python -m pytest tests/test_ptxvm.py -k form

# Broken off and called again, it goes on with the runs that have not passed since the last change.
vm-full: $(FULL_LOGS)
	@for log in $(FULL_LOGS); do \
	    echo "$$(basename $$log .log): $$(tail -n 1 $$log | tr -d =)"; done | tee $(FULL)/summary

FULL_RUN = $(ON_VM) $(FULL_SETTINGS) $(VM_TESTS) --every-parameter $(FULL_CHOICE) $(ARGS)
$(FULL)/%.log: FULL_SETTINGS = RING_ATTENTION_PTXVM_SEED=$(firstword $(subst -, ,$*)) \
    RING_ATTENTION_PTXVM_SMEM=$(lastword $(subst -, ,$*))
$(FULL)/%-227.log: FULL_SETTINGS = RING_ATTENTION_CPU=ptx-sm90 RING_ATTENTION_PTXVM_SEED=$(firstword $(subst -, ,$*))
$(FULL)/%-227.log: FULL_CHOICE = $(HOPPER_CHOICE)
$(FULL)/atomic.log: FULL_SETTINGS = RING_ATTENTION_CUDA_BACKWARD=atomic
$(FULL)/atomic.log: FULL_CHOICE = -k "error_is_at_most or heads or head_dim or any_problem"
$(FULL)/%.log: $(TESTED) | vm-build
	@mkdir -p $(FULL)
	$(FULL_RUN) > $@.part 2>&1 || { tail -n 40 $@.part; exit 1; }
	@mv $@.part $@

mutants: vm-build
	$(ON_VM) PYTHONPATH=$(VM)/lib:tests/ptxvm:tests $(BIN)/python tests/ptxvm/mutants.py $(ARGS)

calibrate: $(VENV)/tools
	$(BIN)/python tests/ptxvm/calibrate.py

vm-build: $(VENV)/built $(if $(filter $(CUDA_BUILD),$(PTXVM)),cuda-build)
	RING_ATTENTION_CUDA=0 RING_ATTENTION_PTXVM=$(PTXVM) $(BIN)/python setup.py --quiet build \
	    --build-base $(VM) --build-lib $(VM)/lib
endif

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
	RING_ATTENTION_CUDA=$(CUDA) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
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
