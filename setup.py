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
# For `make sanitize`. -g1: lines for the reports; the variables too would take the compiler long.
# -fno-wrapv: Python's own flags have -fwrapv, under which no overflow of integers is reported.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZER_FLAGS = [*SANITIZERS, "-fno-omit-frame-pointer", "-fno-wrapv", "-O1", "-g1"]


def setting(name: str, values: tuple[str, ...], remark: str) -> str:
    """The environment variable `name`; unset is the first of its values."""
    value = os.environ.get(name, values[0])
    if value not in values:
        raise SystemExit(
            f"ring_attention: expected {name} unset or {' or '.join(values)}, got {value!r}{remark}"
        )
    return value


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def headers() -> list[str]:
    return sources("csrc/**/*.h", "csrc/**/*.inl")


setting("RING_ATTENTION_CUDA", ("0",), "; this release has CPU kernels only")
SANITIZE = setting("RING_ATTENTION_SANITIZE", ("0", "1"), "") == "1"
COMPILE = [*FLAGS, *(SANITIZER_FLAGS if SANITIZE else ["-O3"])]
LINK = SANITIZERS if SANITIZE else []
print(
    "ring_attention: building the CPU operators and the planner (no CUDA kernels yet)"
    + (", with sanitizers" if SANITIZE else "")
)
setup(
    ext_modules=[
        CppExtension(
            "ring_attention._C",
            sources("csrc/ops.cpp", "csrc/cpu/*.cpp"),
            depends=headers(),
            extra_compile_args={"cxx": [*COMPILE, TORCH_TARGET]},
            extra_link_args=LINK,
            py_limited_api=True,
        ),
        Extension(
            "ring_attention._planner",
            sources("csrc/plan_bindings.cpp", "csrc/plan/*.cpp"),
            include_dirs=[pybind11.get_include()],
            depends=headers(),
            extra_compile_args={"cxx": COMPILE},
            extra_link_args=LINK,
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
