# SPDX-License-Identifier: BSD-3-Clause
"""The command line: python -m ring_attention plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from ring_attention.__main__ import main


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    pytest.importorskip("matplotlib")
    words = f"--tokens 64K --gpus 8 --kv-heads 8 --device H100 --link 400G --draw {picture}"
    assert main(["plan", *words.split()]) == 0
    said = capsys.readouterr().out
    assert "65,536 tokens on 8 ranks" in said and "predicted by a simulation" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    words = "--tokens 64K --queries 32 --gpus 3 --mask full --link 10G --draw " + str(picture)
    assert main(["plan", *words.split(), "--kv-heads", "4", "--compare"]) == 0
    said = capsys.readouterr().out
    assert "32 tokens of queries, 65,536 of keys" in said and "q/q travel" in said
    assert "All schedules that fit, predicted:" in said and "keys per rank" in said
    words = "--tokens 64K --gpus 8 --kv-heads 8 --ulysses 4 --traveller kv q --generator direct"
    assert main(["plan", *words.split(), "--draw", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "generator=direct, resident=1, ulysses=4, kv/q travel" in said
    words = "--tokens 4K --gpus 4 --documents 3000 100 --window 512 --dtype fp32 --device cpu"
    assert main(["plan", *words.split(), "--forward"]) == 0
    said = capsys.readouterr().out
    assert "DocumentBalanced" in said and "backward  " not in said


@pytest.mark.parametrize(
    "words,message",
    [
        ("--device TPU", "expected a device of"),
        ("--layout documents", "needs --documents"),
        ("--memory 0.0001", "expected a schedule within 100 KB"),
        ("--gpus-per-node 2", "node_link and ranks_per_node"),
        ("--device missing.json", "expected a file of figures"),
        ("--kv-heads 5", "heads to be a multiple of kv_heads"),
        ("--kv-heads 2 --ulysses 4", "ulysses to divide kv_heads = 2"),
        ("--traveller kv q q", 'a traveller of "kv", "q"'),
        ("--queries 1K --window 512", "--queries goes with --mask only"),
    ],
)
def test_plan_command_refuses(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tokens", "64K", "--gpus", "4", *words.split()]) == 2
    assert message in capsys.readouterr().err
