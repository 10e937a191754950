# SPDX-License-Identifier: BSD-3-Clause
"""Traces: what ranks write, that it lines up, and what is made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ring_attention import Causal, Full, Zigzag, attention, plan, run_virtual, trace
from ring_attention.__main__ import main
from ring_attention.timeline import Timeline
from ring_attention.trace import Event, Leg
from ring_attention.trace_files import Writer, read

LENGTH = 96


def run_ring(group: Any, mask: Any = None, length: int = LENGTH) -> None:
    layout = Zigzag(length, group.size() if callable(group.size) else group.size)
    q, k, v = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))  # K/V travel
    shards = [layout.shard(x, group, dim=2).requires_grad_() for x in (q, k, v)]
    attention(*shards, mask=mask or Causal(), group=group, layout=layout).sum().backward()


def event(name: Any, rank: int, start_s: float, end_s: float, *legs: Leg, step: int = 0) -> Event:
    nbytes = sum(leg.bytes for leg in legs)
    return Event(
        name, "forward", rank, step, start_s, end_s, nbytes, "g", f"rank{rank}", tuple(legs)
    )


def hop(rank: int, post: tuple, wait: tuple) -> list[Event]:
    legs = [Leg(1 - rank, "K/V", sending, 1000) for sending in (True, False)]
    return [
        event("post", rank, *post, *legs),
        event("compute", rank, post[1], wait[0]),
        event("wait", rank, *wait, *legs),
        event("transfer", rank, post[0], wait[1], *legs),
    ]


# Rank 1 posts a second late, so rank 0 waits: two of three seconds for rank 1, one for the wire.
LATE = [*hop(0, (10, 11), (12, 15)), *hop(1, (13, 14), (15, 15))]


def test_what_the_timeline_says() -> None:
    timeline = Timeline(LATE)
    share = timeline.share("forward", "g", 0)
    assert (share.compute_s, share.post_s, share.transfer_s, share.wait_s) == (1, 1, 5, 3)
    assert share.overlap == pytest.approx(0.4)
    assert share.waiting == pytest.approx(3 / 5)
    assert timeline.share("forward", "g", 1).overlap == 1
    assert timeline.late_s("forward", "g", 0) == 2
    assert timeline.late_s("forward", "g", 1) == 0
    assert timeline.imbalance("forward", "g") == 1
    slowest = timeline.slowest()
    assert slowest is not None
    assert (slowest.sender, slowest.receiver, slowest.seconds) == (1, 0, 1)
    assert timeline.clock_error_s == 0
    more = [*LATE, event("compute", 1, 16, 18)]
    assert Timeline(more).imbalance("forward", "g") == pytest.approx(3 / 2)


def test_a_message_that_arrives_before_it_was_sent_shows_the_clocks_apart() -> None:
    events = [*hop(0, (10, 11), (12, 12)), *hop(1, (13, 14), (15, 15))]
    assert Timeline(events).clock_error_s == 1


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_files_keep_everything(tmp_path: Path, closed: bool) -> None:
    writer = Writer(tmp_path)
    for e in LATE:
        writer.add(e)
    if closed:
        writer.close()
        for path in tmp_path.glob("*.json"):
            ranges = [e for e in json.loads(path.read_text()) if e["ph"] == "X"]
            assert next(e["name"] for e in ranges) == "ring_attention forward 0 post"
            assert {e["pid"] for e in ranges} == {int(path.stem.removeprefix("rank"))}
    else:
        text = (tmp_path / "rank1.json").read_text()
        (tmp_path / "rank1.json").write_text(text + ',\n{"name": "ring_att')
    timeline = read(tmp_path)
    assert timeline.hosts == 1
    got = sorted(timeline.events, key=lambda e: (e.rank, e.name))
    want = sorted(LATE, key=lambda e: (e.rank, e.name))
    ahead_s = got[0].start_s - want[0].start_s
    for a, b in zip(got, want, strict=True):
        assert (a.name, a.phase, a.rank, a.step, a.legs) == (
            b.name,
            b.phase,
            b.rank,
            b.step,
            b.legs,
        )
        assert a.place == b.place and a.group == "g"
        assert a.start_s - ahead_s == pytest.approx(b.start_s, abs=1e-5)
        assert a.seconds == pytest.approx(b.seconds, abs=1e-5)


def test_transfers_that_overlap_have_rows_of_their_own(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    leg = Leg(1, "K/V", True, 8)
    for times in ((1, 3), (2, 4), (3, 5)):
        writer.add(event("transfer", 0, *times, leg))
    writer.close()
    ranges = [e for e in json.loads((tmp_path / "rank0.json").read_text()) if e["ph"] == "X"]
    assert [e["tid"] - ranges[0]["tid"] for e in ranges] == [0, 1, 0]


def traced(group: Any, folder: str) -> None:
    with trace.record(folder):
        run_ring(group)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_processes_line_up(pools: Any, tmp_path: Path, size: int) -> None:
    pools(size).run(traced, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {f"rank{r}.json" for r in range(size)}
    timeline = read(tmp_path)
    assert timeline.hosts == 1
    assert timeline.clock_error_s == 0
    layout = Zigzag(LENGTH, size)
    for rank in range(size):
        steps = plan(Causal(), layout, rank=rank).steps
        kv = [h for h in timeline.hops if h.receiver == rank and h.kind == "K/V"]
        for phase in ("forward", "backward"):
            got = {(h.step, h.sender, h.bytes) for h in kv if h.phase == phase}
            assert got == {
                (step.number, t.peer, t.num_rows * 2 * 2 * 16 * 4)
                for step in steps
                for t in step.recvs
            }
        computed = [
            e.step
            for e in timeline.events
            if (e.rank, e.name, e.phase) == (rank, "compute", "forward")
        ]
        assert computed == [step.number for step in steps if step.folds]
    for h in timeline.hops:
        assert h.packed_s <= h.ended_s


def profiled(group: Any) -> tuple[list[str], list[str]]:
    with (
        trace.record() as events,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
    ):
        run_ring(group)
    names = [e.name for e in profiler.events() if e.name.startswith("ring_attention ")]
    return [trace.label(e.name, e.phase, e.step) for e in events], names


def test_the_profiler_shows_the_same_names(pools: Any) -> None:
    for ours, profiler in pools(2).run(profiled):
        # A transfer spans the other ranges of its step, and those of others: it does not nest.
        ours = [name for name in ours if not name.endswith("transfer")]
        assert {"compute", "post", "wait"} == {name.split()[-1] for name in ours}
        assert sorted(ours) == sorted(name for name in profiler if name in ours)


def test_nobody_listens() -> None:
    made = [trace.begin("compute", "forward", None, step) for step in range(2)]  # type: ignore
    assert made[0] is made[1]
    with trace.record() as outer, trace.record() as inner:
        run_virtual(2, run_ring)
    assert outer == inner and len(outer) > 8
    run_virtual(2, run_ring)
    assert outer == inner


SCRIPT = """
import os, torch, ring_attention as ra, sys
sys.path.insert(0, "tests")
from test_timeline import run_ring
ra.run_virtual(3, run_ring, ra.Full())
os._exit(0)  # as if killed
"""


def test_environment_and_command(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "made" / "here"
    environment = os.environ | {
        "RING_ATTENTION_TRACE": str(folder),
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
    }
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)
    assert main(["trace", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "group 'virtual/0', forward" in printed and "backward" in printed
    assert "slowest hop:" in printed and "overlap" in printed and "imbalance" in printed
    assert "clocks: one machine, exact" in printed
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    hops = read(folder).hops
    block = LENGTH // 3 * 2 * 2 * 16 * 4
    assert len([h for h in hops if h.phase == "forward" and h.bytes == block]) == 3 * 2
    # One rank's file is missing.
    (folder / "virtual2.json").unlink()
    assert main(["trace", str(folder)]) == 2
    assert "none of rank 2" in capsys.readouterr().err


def test_command_refuses(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert main(["trace", str(tmp_path)]) == 2
    assert "RING_ATTENTION_TRACE" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder"):
        Writer(tmp_path / "file")
    with trace.record(tmp_path):
        run_virtual(2, run_ring, Full())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "ring_attention.timeline_picture", raising=False)
    assert main(["trace", str(tmp_path)]) == 2
    assert "pip install matplotlib, or pass --no-picture" in capsys.readouterr().err
    assert main(["trace", str(tmp_path), "--no-picture"]) == 0
