# SPDX-License-Identifier: BSD-3-Clause
"""The virtual GPU's own tests: instructions with known answers, bugs that it must report.

tests/ptxvm/unit holds the cases. They are compiled by nvcc once, into build/ptxvm/unit.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forms
import pytest
from compiler import BUILD, CXX, HERE, NVCC, compile_object, machine

SEEDS = ("1", "2", "3")

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc is missing (PATH, CUDA_HOME): no PTX to execute"
)


@pytest.fixture(scope="session")
def unit() -> Path:
    """The program with all cases."""
    sources = [*machine(), *sorted(HERE.glob("unit/*.c*"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_object, sources))
    program = BUILD / "unit"
    subprocess.run([CXX[0], *map(str, objects), "-o", str(program)], check=True)
    return program


def lines_of(program: Path, *arguments: str) -> list[str]:
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=250)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout.splitlines()


def run(program: Path, *arguments: str) -> dict[str, str]:
    lines = (line.split("\t") for line in lines_of(program, *arguments))
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


def test_the_readme_says_what_is_reported(unit: Path) -> None:
    """The table of bugs, row by row: `name | report`. Addresses and counts may differ."""
    text = (HERE / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, flags=re.MULTILINE))
    reports = run(unit, "--reports")
    assert table.keys() == reports.keys()
    for name, report in reports.items():
        what, _, place = report.partition("   kernel ")
        what = re.sub(r"; [a-z ]+ at \S+:\d.*", "", what).strip()  # written, issued
        assert digits_aside(table[name]) == digits_aside(what), name
        if place:
            assert re.search(r"at \S*:\d+.*   block \(.*\), warp \d+", place), report


def digits_aside(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "N", text)


def test_no_form_without_a_calibrator(unit: Path) -> None:
    """Each instruction form of our kernels was executed by a calibrator or by a unit kernel."""
    ours = forms.of_our_kernels()
    if not ours:
        pytest.skip("no kernels have been compiled: make vm")
    covered = forms.calibrated() | set(lines_of(unit, "--forms"))
    assert len(ours) > 100 and not ours - covered
