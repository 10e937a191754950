# SPDX-License-Identifier: BSD-3-Clause
"""Figures of hardware, named and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ring_attention.__main__ import main
from ring_attention.figures import DEVICES, LINKS, Machine, load, save


def test_figures_are_values(tmp_path: Path) -> None:
    for device in DEVICES:
        for link in LINKS:
            assert str(Machine(device.lower(), link)) == f"{device}, {link}"
    made = Machine("CPU", "10G")
    save(tmp_path / "figures.json", made, measured="never")
    assert load(tmp_path / "figures.json") == made
    assert json.loads((tmp_path / "figures.json").read_text())["measured"] == "never"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"figures.load: expected a file of figures, got"):
        load(tmp_path / "bad.json")


def test_calibrate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = f"{file} --tokens 256 --rounds 1 --megabytes 1 --dtype float32"
    assert main(["calibrate", *words.split()]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    measured = load(file)
    assert measured.device.rate("float32", True) > 1e8 and measured.link.bytes_per_s > 1e6
    assert (
        main(["plan", "--tokens", "4K", "--gpus", "2", "--dtype", "fp32", "--device", str(file)])
        == 0
    )
    assert main(["calibrate", str(tmp_path / "no" / "figures.json")]) == 2
