# SPDX-License-Identifier: BSD-3-Clause
"""The emulation of AVX-512 and AMX itself, see tests/emulated_isa (make emulated)."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ring_attention import ops

HERE = Path(__file__).parent / "emulated_isa"
BUILD = HERE.parents[1] / "build" / "emulated"

pytestmark = pytest.mark.skipif(
    not {"avx2", "avx512"} & set(ops.isa_names()), reason="this machine's processor has no AVX2"
)
# As in that build: what is inlined differs with the optimisation.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-DRA_EMULATED"]
FAULTS = {
    "palette": "palette 0 or 1",
    "rows": "16 rows of 64 bytes",
    "ninth": "8 tile registers",
    "released": "without _tile_loadconfig",
    "no-rows": "has no rows",
    "product": "c [m][n], a [m][k] and b [k][n]",
    "same": "three tile registers",
}


@pytest.fixture(scope="module")
def known_answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulated") / "known_answers"
    compiler = os.environ.get("CXX", "g++")
    source = str(HERE / "known_answers.cpp")
    subprocess.run([compiler, *FLAGS, source, "-o", str(program)], check=True, timeout=120)
    return program


def test_instructions_give_the_known_answers(known_answers: Path) -> None:
    result = subprocess.run([known_answers], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    count = re.fullmatch(r"(\d+) checks, 0 failed\n", result.stdout)
    assert count and int(count[1]) > 600


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_processor_refuses_ends_the_process(known_answers: Path, fault: str) -> None:
    result = subprocess.run([known_answers, fault], capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGABRT
    assert FAULTS[fault] in result.stderr


def test_the_library_has_no_instruction_that_is_emulated() -> None:
    libraries = list(BUILD.glob("lib/ring_attention/_C.*"))
    if not libraries or shutil.which("objdump") is None:
        pytest.skip("make emulated has not built it, or objdump (of binutils) is missing")
    command = ["objdump", "-d", "--no-show-raw-insn", str(libraries[0])]
    code = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    registers = r"%zmm\d+|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b|%tmm\d"
    assert len(re.findall(r"%ymm\d+", code)) > 10000
    assert not re.findall(rf"^.*(?:{registers}).*$", code, flags=re.MULTILINE)[:5]
