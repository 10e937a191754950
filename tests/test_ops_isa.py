# SPDX-License-Identifier: BSD-3-Clause
"""The operators' libraries: which instruction set is used, and every test of operators for each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ring_attention import ops


def run_python(*args: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RING_ATTENTION_CPU": isa}
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.isa
def test_the_forced_isa_is_used() -> None:
    assert ops.isa_name() == os.environ.get("RING_ATTENTION_CPU", ops.isa_name())
    assert ops.isa_name() in ops.isa_names()


@pytest.mark.parametrize("isa", [name for name in ops.isa_names() if name != ops.isa_name()])
def test_isa(isa: str) -> None:
    """Every test marked `isa`, again."""
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_ops*.py"))]
    result = run_python(
        "-m", "pytest", "-x", "-m", "isa", "-p", "no:cacheprovider", *files, isa=isa
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "passed" in result.stdout


def test_an_unknown_isa_is_refused() -> None:
    code = "from ring_attention import ops; ops.isa_name()"
    result = run_python("-c", code, isa="abacus")
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert "RING_ATTENTION_CPU" in message and "abacus" in message
    assert all(name in message for name in ops.isa_names())


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    source = Path(ops.__file__).parent
    package = tmp_path / "ring_attention"
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_text(file.read_text())
    (package / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ring_attention.ops"
    result = run_python("-P", "-c", code, isa="")
    assert result.returncode != 0
    assert "ImportError: ring_attention: expected" in result.stderr
    assert "pip install ." in result.stderr
