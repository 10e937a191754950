# SPDX-License-Identifier: BSD-3-Clause
"""Builds the two native modules of ring_attention.

_C        the operators, on LibTorch's stable ABI: one binary serves every torch from 2.11 on
_planner  the planner, a pybind11 module without torch
"""

import os
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI the operators may use: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No -march: each ISA enables its own instructions and is chosen at run time.
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def headers() -> list[str]:
    return sources("csrc/**/*.h", "csrc/**/*.inl")


def refuse_cuda() -> None:
    if os.environ.get("RING_ATTENTION_CUDA", "0") != "0":
        raise SystemExit(
            "ring_attention: expected RING_ATTENTION_CUDA unset or 0, got "
            f"{os.environ['RING_ATTENTION_CUDA']}; this release has CPU kernels only"
        )
    print("ring_attention: building the CPU operators and the planner (no CUDA kernels yet)")


refuse_cuda()
setup(
    ext_modules=[
        CppExtension(
            "ring_attention._C",
            sources("csrc/ops.cpp", "csrc/cpu/*.cpp"),
            depends=headers(),
            extra_compile_args={"cxx": [*FLAGS, TORCH_TARGET]},
            py_limited_api=True,
        ),
        Extension(
            "ring_attention._planner",
            sources("csrc/plan_bindings.cpp", "csrc/plan/*.cpp"),
            include_dirs=[pybind11.get_include()],
            depends=headers(),
            extra_compile_args={"cxx": FLAGS},
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
