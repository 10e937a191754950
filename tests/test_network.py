# SPDX-License-Identifier: BSD-3-Clause
"""The network benchmark: its arithmetic, and that it runs where it may and cleans up."""

import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import ring_attention as ra
from break_even import Hop, Measured, Shaped, measured_break_even, predicted, simulated
from network_rank import Shape

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def turn(sending: bool, wait_s: float) -> tuple[dict[str, Any], ...]:
    """Two ranks of which the second waits; folds take two seconds, one of them hides the hop."""
    common = {"sending": sending, "start_s": 5.0, "compute": 2.0, "bytes": 100}
    hop = {"bytes": 100, "moved": 200, "hiding_s": 1.0}
    return tuple(
        common
        | {"hops": [hop | {"waited_s": waited}]}
        | {"wait": waited, "end_s": 7.0 + waited, "cpu_s": 2.5 if sending else 2.0}
        | {"posts": [[4.75, 5.25 if sending else 5.0]], "arrived_s": [6.0 + waited]}
        for waited in (0.0, wait_s)
    )


def test_measured_break_even_is_where_waiting_ends() -> None:
    # Hops of c / 1000 s, hidden by (c / 1000)^2 s.
    points = []
    for tokens in (500, 800, 1300):
        exposed_s = max(0.0, 1000 / tokens - 1)  # in units of the fold that hides it
        points.append(Measured.of(tokens, [turn(True, exposed_s), turn(False, 0.0)]))
    assert measured_break_even(points) == pytest.approx(1000)
    assert [p.waiting for p in points] == pytest.approx([1 / 3, 0.25 / 2.25, 0])
    assert [p.link_waiting for p in points] == pytest.approx([1 / 3, 0.25 / 2.25, 0])
    assert [p.seconds for p in points] == pytest.approx([3, 2.25, 2])
    assert points[0].hops == [Hop(100, 200, 1.0)] and points[0].alone_s == 2
    assert points[0].sent_bytes == 100
    assert points[0].theft_s == pytest.approx(1)
    assert math.isnan(measured_break_even(points[2:]))
    assert predicted(points, Shaped(50.0, 0.0)) == pytest.approx(2 * 1300)  # flat beyond the last
    # A hundredth of a second for each of 200 bytes moved hides the 2 s of a hop.
    assert points[0].break_even(Shaped(50.0, 0.01)) == 0


def test_waiting_for_a_late_rank_is_not_for_the_link() -> None:
    late, waits = turn(True, 3.0)
    late |= {"posts": [[7.75, 8.25]], "arrived_s": [9.0], "end_s": 10.0}
    measured = Measured.of(1000, [(late, waits), turn(False, 0.0)])
    assert measured.waiting == pytest.approx(3 / 5) and measured.link_waiting == 0
    assert measured.exposed == pytest.approx(1)


def test_the_worst_hop_counts() -> None:
    """Two hops of a backward: the second carries more, for its share of the folds."""
    ranks = turn(False, 0.0)
    for rank, hiding in zip(ranks, ((1.0, 1.0), (1.0, 3.0)), strict=True):
        hops = zip((100, 400), hiding, strict=True)
        rank["hops"] = [{"bytes": n, "moved": 2 * n, "hiding_s": hiding_s} for n, hiding_s in hops]
    measured = Measured.of(1000, [turn(True, 0.0), ranks])
    assert measured.hops == [Hop(100, 200, 1.0), Hop(400, 800, 2.0)]
    assert measured.break_even(Shaped(100.0, 0.0)) == 2000


def test_whole_blocks_have_the_closed_form() -> None:
    """A hop of whole shards behind a fold of whole blocks: break_even, at the folds' rate."""
    tokens, flops, bytes_s = 500, 50e9, 10e6
    shapes = ra.Shapes(8, 2, 64)
    rates, taken = {"bfloat16": flops}, 20e-9
    device = ra.Device("measured", rates, rates, 1e12, 1e30, cpu_s_per_byte=taken)
    forward, backward = ra.break_even(shapes, ra.Machine(device, ra.Link("link", bytes_s)))
    fold_s = shapes.flops_per_pair * tokens**2 / flops
    for nbytes, hiding_s, expected in (
        (shapes.kv_bytes(tokens), fold_s, forward),
        (shapes.kv_bytes(tokens) + shapes.grad_bytes(tokens), 2.5 * fold_s, backward),
    ):
        turns = turn(True, 0.0), turn(False, 0.0)
        for rank in turns[1]:
            rank["hops"] = [{"bytes": nbytes, "moved": 2 * nbytes, "hiding_s": hiding_s}]
        point = Measured.of(tokens, list(turns))
        assert predicted([point], Shaped(bytes_s, taken)) == pytest.approx(expected)


def test_a_call_is_simulated() -> None:
    """Folds of two equal halves, of which the first hides the hop: K/V of 1,000 rows."""
    row = {"shape": asdict(Shape("bf16", 8, 2, 64)), "mask": "full", "direction": "forward"}
    hop_bytes = 1000 * 2 * 2 * 64 * 2
    point = replace(Measured.of(1000, [turn(True, 0.0), turn(False, 0.0)]), folding_s=1.6)
    for hop_s, expected in ((0.5, 2.0), (1.3, 2.5)):  # alone: 2 s, of which folds 1.6
        link = Shaped(hop_bytes / hop_s, 0.0)
        assert simulated(row | {"ranks": 2}, point, link) == pytest.approx(expected, rel=1e-6)


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
