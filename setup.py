# SPDX-License-Identifier: BSD-3-Clause
"""Builds the native modules of ring_attention.

_C        the operators, on LibTorch's stable ABI: one binary serves every torch from 2.11 on
_C_cuda   the same on CUDA, a library of its own that is loaded only where torch has CUDA
_planner  the planner, a pybind11 module without torch

RING_ATTENTION_CUDA=1 builds _C_cuda, 0 does not, "only" builds nothing else; unset, it is built
where nvcc and a torch with CUDA are. Whether this machine has a GPU does not matter.
RING_ATTENTION_LINES=1 leaves source lines in its machine code, for profilers and compute-sanitizer.

For tests, RING_ATTENTION_PTXVM=1 builds another _C, whose ISA table has the CUDA kernels, their PTX
interpreted (tests/ptxvm). nvcc compiles PTX alone then, or nothing: RING_ATTENTION_PTXVM=build/cuda
takes the kernels that a build with RING_ATTENTION_CUDA=only left in that folder. And with
RING_ATTENTION_EMULATED=1 the rows of AVX-512 and AMX run wherever AVX2 is, their instructions
emulated (tests/emulated_isa).
"""

import copy
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI the operators may use: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No -march: each ISA enables its own instructions and is chosen at run time. No contraction: where
# the kernels want a product rounded, see to_log2_units() in forward.inl, they must get it.
FLAGS = [
    "-std=c++20",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
# -v: registers and spills, for tests/test_cuda_build.py. -lineinfo is for the virtual GPU, which
# reads it in the PTX.
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += ["-Werror=all-warnings", "-Xptxas=-v,--warning-as-error"]
# Lines in machine code come with copies of the PTX, and make the library three times as large.
NO_LINES = ["-Xptxas=-suppress-debug-info"]
# One PTX for all GPUS, which `make vm` executes. sm_80 serves 8.6 and 8.9, sm_100 10.3.
GPUS = ["sm_80", "sm_90", "sm_100", "sm_120"]
PTX = "compute_80"  # for whatever comes later
# Kernels of Hopper's own instructions are for it alone, by another PTX.
HOPPER, HOPPER_PTX = "sm_90a", "compute_90a"
READABLE = ["--compress-mode=none"]  # PTX as the virtual GPU reads it
# For `make sanitize`. -g1: lines for the reports; the variables too would take the compiler long.
# -fno-wrapv: Python's own flags have -fwrapv, under which no overflow of integers is reported.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZER_FLAGS = [*SANITIZERS, "-fno-omit-frame-pointer", "-fno-wrapv", "-O1", "-g1"]
# For `make emulated`. Unrolled register tiles of emulated instructions would take the compiler five
# times as long.
EMULATED_FLAGS = ["-DRA_EMULATED", "-O1", "-fno-tree-loop-optimize"]


def setting(name: str, *others: str) -> str | None:
    """The environment variable `name`: "0", "1", one of `others`, or None where it is unset."""
    value = os.environ.get(name)
    if value not in (None, "0", "1", *others):
        allowed = " or ".join(["unset", "0", "1", *others])
        raise SystemExit(f"ring_attention: expected {name} {allowed}, got {value!r}")
    return value


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def cuda() -> tuple[bool, str]:
    """Whether to build _C_cuda, and why."""
    asked = setting("RING_ATTENTION_CUDA", "only")
    if PTXVM is not None and asked in ("1", "only"):
        raise SystemExit(
            f"ring_attention: expected RING_ATTENTION_CUDA unset or 0 with RING_ATTENTION_PTXVM="
            f"{PTXVM}, got {asked!r}; that test build has no _C_cuda, build it by itself"
        )
    for name, value in ("CUDA", asked), ("PTXVM", PTXVM):
        if value not in (None, "0") and CUDA_HOME is None:
            raise SystemExit(
                f"ring_attention: expected nvcc with RING_ATTENTION_{name}={value}, found none; "
                f"install the CUDA toolkit, set CUDA_HOME, or set RING_ATTENTION_{name}=0"
            )
    if PTXVM is not None:
        return False, f"RING_ATTENTION_PTXVM={PTXVM}"
    if asked is not None:
        return asked != "0", f"RING_ATTENTION_CUDA={asked}"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} has no CUDA"
    return CUDA_HOME is not None, f"nvcc in {CUDA_HOME}" if CUDA_HOME else "no nvcc found"


def objects(build: str) -> list[str]:
    """The kernels' objects in the folder of a build with RING_ATTENTION_CUDA=only."""
    found = {
        kernel: [*Path(build).glob(f"temp*/{Path(kernel).with_suffix('.o')}")] for kernel in KERNELS
    }
    missing = [kernel for kernel, files in found.items() if len(files) != 1]
    if missing:
        raise SystemExit(
            f"ring_attention: expected an object of each kernel in RING_ATTENTION_PTXVM={build}, "
            f"found none or several of {missing}; make cuda, or set RING_ATTENTION_PTXVM=1"
        )
    return [str(file) for files in found.values() for file in files]


class Build(BuildExtension):
    """Compiles kernels in folders named sm90 for that GPU alone."""

    def build_extension(self, ext: Extension) -> None:
        hopper = [file for file in ext.sources if "/sm90/" in file]
        if hopper:
            codes = [HOPPER_PTX] if PTXVM else [HOPPER, HOPPER_PTX] if ONLY_CUDA else [HOPPER]
            flags = ext.extra_compile_args["nvcc"]
            nvcc = [flag for flag in flags if not flag.startswith("-gencode")]
            nvcc += [f"-gencode=arch={HOPPER_PTX},code={code}" for code in codes]
            compiled = self.compiler.compile(
                hopper,
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs={**ext.extra_compile_args, "nvcc": nvcc},
                depends=ext.depends,
            )
            ext = copy.copy(ext)  # which lists its sources in distributions, too
            ext.sources = [file for file in ext.sources if file not in hopper]
            ext.depends = [*ext.depends, *compiled]
            ext.extra_objects = [*ext.extra_objects, *compiled]
        super().build_extension(ext)


def extension(
    make: Callable[..., Extension], name: str, files: list[str], **flags: list[str]
) -> Extension:
    nvcc = [*NVCC_FLAGS, *([] if LINES else NO_LINES), *flags.get("nvcc", [])]
    nvcc += [f"-gencode=arch={PTX},code={gpu}" for gpu in flags.get("gpus", [])]
    made = make(
        f"ring_attention.{name}",
        files,
        include_dirs=[str(ROOT / "csrc"), *flags.get("include_dirs", [])],
        depends=[*HEADERS, *flags.get("extra_objects", [])],
        extra_objects=flags.get("extra_objects", []),
        extra_compile_args={"cxx": [*COMPILE, *flags.get("cxx", [])], "nvcc": nvcc},
        extra_link_args=SANITIZERS if SANITIZE else [],
        language="c++",
        py_limited_api=make is not Extension,
    )
    made.libraries = flags.get("libraries", made.libraries)
    return made


SANITIZE = setting("RING_ATTENTION_SANITIZE") == "1"
LINES = setting("RING_ATTENTION_LINES") == "1"
# For `make vm`. None: an ordinary build.
PTXVM = os.environ.get("RING_ATTENTION_PTXVM", "0")
PTXVM = None if PTXVM == "0" else PTXVM
EMULATED = setting("RING_ATTENTION_EMULATED") == "1"
if EMULATED and PTXVM is not None:
    raise SystemExit(
        f"ring_attention: expected RING_ATTENTION_EMULATED unset or 0 with RING_ATTENTION_PTXVM="
        f"{PTXVM}, got '1'; a build is for one of these tests"
    )
if EMULATED and platform.machine() != "x86_64":
    raise SystemExit(
        f"ring_attention: expected x86_64 with RING_ATTENTION_EMULATED=1, got "
        f"{platform.machine()}; the emulation is made of AVX2, unset it"
    )
KERNELS = sources("csrc/cuda/**/*.cu")
HEADERS = sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh", "tests/[ep]*/**/*.h")
CUDA, why = cuda()
ONLY_CUDA = os.environ.get("RING_ATTENTION_CUDA") == "only"  # for `make cuda`
COMPILE = [*FLAGS, *(SANITIZER_FLAGS if SANITIZE else ["-O3"])]
COMPILE += EMULATED_FLAGS if EMULATED else []
modules: list[Any] = [
    extension(
        Extension,
        "_planner",
        sources("csrc/plan_bindings.cpp", "csrc/plan/*.cpp"),
        include_dirs=[pybind11.get_include()],
    )
]
if PTXVM:
    files = ["csrc/ops.cpp", *(f"csrc/cpu/{x}.cpp" for x in ("dispatch", "isa_scalar", "state"))]
    files += sources("tests/ptxvm/*.cpp", "tests/ptxvm/[ir]*/*.cpp")
    modules.append(
        extension(
            CUDAExtension,
            "_C",
            files + (KERNELS if PTXVM == "1" else []),
            extra_objects=[] if PTXVM == "1" else objects(PTXVM),
            cxx=[TORCH_TARGET, "-DRA_PTXVM"],
            nvcc=READABLE,
            gpus=[PTX],
            libraries=["torch_cpu", "torch"],  # no CUDA runtime: the interpreter brings its own
        )
    )
else:
    files = sources("csrc/ops.cpp", "csrc/cpu/*.cpp")
    if EMULATED:
        files[files.index("csrc/cpu/isa_avx2.cpp")] = "tests/emulated_isa/avx2.cpp"
    modules.append(extension(CppExtension, "_C", files, cxx=[TORCH_TARGET]))
if CUDA:
    modules.append(
        extension(
            CUDAExtension,
            "_C_cuda",
            ["csrc/ops_cuda.cpp", *KERNELS],
            cxx=[TORCH_TARGET, "-DUSE_CUDA"],
            nvcc=READABLE if ONLY_CUDA else [],
            gpus=[*GPUS, PTX],
            libraries=["torch_cuda", "torch_cpu", "torch", "cudart_static", "rt", "dl", "pthread"],
        )
    )
if ONLY_CUDA:
    modules = modules[-1:]
names = ", ".join(module.name.split(".")[1] for module in modules)
with_what = ", AVX-512 and AMX emulated" if EMULATED else ""
with_what += ", with sanitizers" if SANITIZE else ""
print(f"ring_attention: building {names} ({why}){with_what}")
setup(ext_modules=modules, cmdclass={"build_ext": Build})
