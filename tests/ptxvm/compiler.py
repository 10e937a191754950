# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the virtual GPU and programs that run on it, into build/ptxvm/unit."""

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "ptxvm" / "unit"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which(str(CUDA_HOME / "bin" / "nvcc"))
TOOLKIT = Path(NVCC or "/bin/nvcc").resolve().parents[1] / "include"

# -O1: the cases run for a second, compiling takes a minute.
CXX = [
    os.environ.get("CXX", "g++"),
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fvisibility=hidden",
]
PTX = ["-lineinfo", "-gencode", "arch=compute_80,code=compute_80", "--compress-mode=none"]


def compile_object(source: Path) -> Path:
    """Compiles a source unless its object is newer than every source of the virtual GPU."""
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"{source.parent.name}-{source.name}.o"
    newest = max(path.stat().st_mtime for path in [source, *HERE.rglob("*.h")])
    if target.exists() and target.stat().st_mtime > newest:
        return target
    if source.suffix == ".cu":
        arch = "90a" if source.stem.endswith("_90a") else "80"
        command = [str(NVCC), "-std=c++20", *(x.replace("_80", f"_{arch}") for x in PTX)]
    else:
        command = [*CXX, "-isystem", str(TOOLKIT)]
    result = subprocess.run(
        [*command, "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    return target


def machine() -> list[Path]:
    """The sources of the virtual GPU."""
    return sorted([*HERE.glob("*.cpp"), *HERE.glob("instructions/*.cpp")])
