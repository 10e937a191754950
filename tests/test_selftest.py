# SPDX-License-Identifier: BSD-3-Clause
"""`python -m ring_attention selftest`, on the CPU: its verdict has to be able to be both."""

import pytest
import torch

from ring_attention.__main__ import main
from ring_attention.commands import selftest


def test_kernels_of_this_machine_pass(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--dtype", "float32,bfloat16", "--head-dim", "40"]
    assert main(["selftest", *arguments, "--length", "64"]) == 0
    printed = capsys.readouterr().out
    assert "| float32 | 40/40 |" in printed and "| bfloat16 | 40/40 |" in printed
    assert "DIFFERS" not in printed and "ok:" in printed


@pytest.mark.parametrize("what", range(6), ids=selftest.NAMES)
def test_a_wrong_result_fails(
    what: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selftest.by_kernels

    def wrong(case: selftest.Case, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        results = [x.clone() for x in right(case, inputs)]
        if what < len(results):
            results[what].view(-1)[-1] += 0.05 * results[what].nan_to_num(neginf=0).abs().max()
        return results

    monkeypatch.setattr(selftest, "by_kernels", wrong)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[-1:])
    arguments = ["--device", "cpu", "--dtype", "bfloat16", "--head-dim", "16", "--no-timings"]
    assert main(["selftest", *arguments]) == 1
    assert f"| {selftest.NAMES[what]}, case 0 |" in capsys.readouterr().out


def test_a_device_without_kernels_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "mps"]) == 2
    assert "no kernels for mps" in capsys.readouterr().out
