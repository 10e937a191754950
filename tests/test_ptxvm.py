# SPDX-License-Identifier: BSD-3-Clause
"""The virtual GPU's own tests: instructions with known answers, bugs that it must report.

tests/ptxvm/unit holds the cases. They are compiled by nvcc once, into build/ptxvm/unit.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "ptxvm"
BUILD = HERE.parents[1] / "build" / "ptxvm" / "unit"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which(str(CUDA_HOME / "bin" / "nvcc"))
SEEDS = ("1", "2", "3")

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc is missing (PATH, CUDA_HOME): no PTX to execute"
)

# -O1: the cases run for a second, compiling takes a minute.
CXX = [
    os.environ.get("CXX", "g++"),
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fvisibility=hidden",
]
PTX = ["-std=c++20", "-lineinfo", "-gencode", "arch=compute_80,code=compute_80"]
PTX += ["--compress-mode=none"]


def compile_object(source: Path) -> Path:
    """Compiles a source unless its object is newer than every source of the virtual GPU."""
    target = BUILD / f"{source.parent.name}-{source.name}.o"
    newest = max(path.stat().st_mtime for path in [source, *HERE.rglob("*.h")])
    if target.exists() and target.stat().st_mtime > newest:
        return target
    if source.suffix == ".cu":
        command = [NVCC, *PTX]
    else:
        command = [*CXX, "-isystem", str(Path(NVCC).resolve().parents[1] / "include")]
    result = subprocess.run(
        [*command, "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        pytest.fail(result.stdout + result.stderr, pytrace=False)
    return target


@pytest.fixture(scope="session")
def unit() -> Path:
    """The program with all cases."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [*HERE.glob("*.cpp"), *HERE.glob("instructions/*.cpp"), *HERE.glob("unit/*.c*")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_object, sorted(sources)))
    program = BUILD / "unit"
    subprocess.run([CXX[0], *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str) -> dict[str, str]:
    result = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, timeout=250
    )
    assert result.returncode in (0, 1), result.stderr
    lines = (line.split("\t") for line in result.stdout.splitlines())
    return {name: text for name, text in lines}


def test_instructions(unit: Path) -> None:
    """Every form gives the known answer, and what is right is not reported."""
    bugs = {name for name, fault in run(unit).items() if fault}
    results = run(unit, *SEEDS)
    problems = {name: text for name, text in results.items() if name not in bugs and text != "ok"}
    assert not problems
    assert len(results) - len(bugs) > 140


def test_bugs_are_reported(unit: Path) -> None:
    """Every bug is reported by name and place, with every seed."""
    bugs = {name for name, fault in run(unit).items() if fault}
    results = run(unit, *SEEDS)
    assert not {name: results[name] for name in bugs if results[name] != "ok"}
    assert len(bugs) > 25
