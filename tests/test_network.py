# SPDX-License-Identifier: BSD-3-Clause
"""The network benchmark: its arithmetic, and that it runs where it may and cleans up."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from network import Measured, Shape, measured_break_even, predicted

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_break_even_is_where_a_hop_takes_as_long_as_what_hides_it(dtype: str, mask: str) -> None:
    shape, flops, bytes_s = Shape(dtype, heads=8, kv_heads=2, head_dim=64), 50e9, 10e6
    size = 2 if dtype == "bf16" else 4
    for direction, row_bytes in (("forward", size), ("backward", size + 4)):
        tokens = shape.break_even(direction, mask, flops, bytes_s)
        pairs = tokens**2 / (2 if mask == "causal" else 1)
        transfer_s = tokens * 2 * shape.kv_heads * shape.head_dim * row_bytes / bytes_s
        assert shape.flops(direction, pairs) / flops == pytest.approx(transfer_s)
    assert shape.break_even("backward", mask, flops, bytes_s) == pytest.approx(
        shape.break_even("forward", mask, flops, bytes_s) * (1.2 if dtype == "bf16" else 0.8)
    )


def turn(sending: bool, wait_s: float) -> tuple[dict[str, Any], ...]:
    """Two ranks of which the second waits; folds take two seconds, one of them hides the hop."""
    common = {"sending": sending, "start_s": 5.0, "compute": 2.0, "hiding": 1.0, "bytes": 100}
    return tuple(
        common
        | {"wait": waited, "end_s": 7.0 + waited, "cpu_s": 2.5 if sending else 2.0}
        | {"posted_s": [5.0], "arrived_s": [6.0 + waited]}
        for waited in (0.0, wait_s)
    )


def test_measured_break_even_is_where_waiting_ends() -> None:
    # Hops of c / 1000 s, hidden by (c / 1000)^2 s.
    points = []
    for tokens in (500, 800, 1300):
        exposed_s = max(0.0, 1000 / tokens - 1)  # in units of the fold that hides it
        points.append(Measured.of(4.0, tokens, [turn(True, exposed_s), turn(False, 0.0)]))
    assert measured_break_even(points) == pytest.approx(1000)
    assert [p.waiting for p in points] == pytest.approx([1 / 3, 0.25 / 2.25, 0])
    assert [p.seconds for p in points] == pytest.approx([3, 2.25, 2])
    assert points[0].rate == 2 and points[0].alone_s == 2 and points[0].sent_bytes == 100
    assert points[0].theft_s == pytest.approx(1)
    assert math.isnan(measured_break_even(points[2:]))
    assert predicted(Shape("bf16", 1, 1, 64), "forward", "full", {256: 5e9}, 1e7) == 500


def test_runs_in_namespaces_and_leaves_none() -> None:
    argv = "--mbit 500 --mask causal --direction backward --rounds 1 --max-tokens 256 --heads 16"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "network.py"), *argv.split()],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )
    assert done.returncode == 0, done.stderr
    if "skipped:" in done.stdout:
        pytest.skip(done.stdout.split("skipped:")[1].strip())
    assert "backward  causal   500" in done.stdout
    left = [p.name for p in Path("/run/netns").glob("ring-attention-*")]
    assert not [name for name in left if not Path(f"/proc/{name.split('-')[2]}").exists()]
