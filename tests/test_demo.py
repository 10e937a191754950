# SPDX-License-Identifier: BSD-3-Clause
"""The examples run, on real processes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def launch(*arguments: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user would: plainly, or on `ranks` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    search = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *(launcher if ranks else []), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.txt", "deeper/b.txt"):
        (folder / name).write_text("All work and no play makes Jack a dull boy.\n" * 50)
    (folder / "binary").write_bytes(b"\0\1\2")
    return folder


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(EXAMPLES)


def test_attention() -> None:
    done = launch(EXAMPLES / "attention.py", ranks=2)
    assert done.returncode == 0, done.stderr
    for rank, rows in enumerate((2501, 2502)):
        assert f"rank {rank}: [1, 8, {rows}, 64], difference" in done.stdout


def test_train_draws_and_resumes(text: Path, tmp_path: Path, extras: None) -> None:
    out = tmp_path / "out"
    arguments = [EXAMPLES / "train.py", "--text", text, "--out", out, "--schedule"]
    done = launch(*arguments, "96x1,257x2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "bounds met" in done.stdout and "257 tokens in one sequence, on 2 ranks" in done.stdout
    assert "100%" in done.stderr and "bits/byte" in done.stderr
    for picture in ("loss.png", "timeline.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    first = torch.load(out / "checkpoint.pt", weights_only=True)
    assert [now["context"] for now in first["history"]] == [96, 257, 257]

    done = launch(*arguments, "96x1,257x3", "--resume")  # one process can go on with it
    assert done.returncode == 0, done.stderr
    second = torch.load(out / "checkpoint.pt", weights_only=True)
    assert second["history"][:3] == first["history"] and len(second["history"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "1024"], "expected --schedule like"),
        (["--schedule", "1024x0"], "expected --schedule like"),
        (["--schedule", "999999999x1"], "4401 bytes of text, for a context of 999999999"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--device", "cuda"], "this release has no CUDA kernels yet"),
        (["--resume", "--schedule", "64x1"], "start without it"),
    ],
)
def test_bad_arguments_get_one_clear_error(
    arguments: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    extras: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = ["--text", str(text), "--out", str(tmp_path / "out"), "--check"]
    monkeypatch.setattr(sys, "argv", ["train.py", *defaults, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_missing_extras_get_one_line(extras: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"tqdm.*pip install '\.\[demo\]'"):
        runpy.run_path(str(EXAMPLES / "train.py"))
