# SPDX-License-Identifier: BSD-3-Clause
"""Predictions against counts by brute force, closed forms, and what real rings borrow."""

from __future__ import annotations

import doctest
import importlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import ring_attention as ra
from ring_attention.__main__ import main
from ring_attention.buffers import BufferPool
from ring_attention.costs import Costs, break_even
from ring_attention.figures import DEVICES, LINKS, Device, Link, Machine, load, save
from ring_attention.predict import predict
from ring_attention.shapes import Shapes
from ring_attention.simulate import simulate
from ring_attention.stages import ring_bytes, stages

# The package's attributes of these names are functions.
predict_module = importlib.import_module("ring_attention.predict")

SHAPES = Shapes(12, 6, 16, dtype="float32")


def machine(link: Link, launch_s: float = 0.0, cpu_s_per_byte: float = 0.0) -> Machine:
    """Nothing costs time but the kernels, the link, and what is asked for."""
    rates = {"bfloat16": 1e12, "float32": 1e12}
    return Machine(Device("test", rates, rates, 1e12, 1e30, launch_s, cpu_s_per_byte), link)


def costs(mask: ra.Mask, layout: ra.Layout, m: Machine, backward: bool, **how: Any) -> list[Costs]:
    plans = [ra.plan(mask, layout, rank=r, **how) for r in range(layout.world_size)]
    return [Costs(p, SHAPES, m, backward) for p in plans]


SCHEDULES: dict[str, dict[str, Any]] = {
    "direct": {"generator": "direct"},
    "chain": {"generator": "chain"},
    "three resident": {"generator": "direct", "resident": 3},
    "double": {"generator": "double", "ranks_per_node": 3},
    "queries": {"traveller": "q"},
    "queries backward": {"traveller": ("kv", "q"), "resident": 2},
    "ulysses": {"ulysses": 2},
    "ulysses alone": {"ulysses": 6},
    "ulysses, queries": {"ulysses": 3, "traveller": ("q", "kv")},
    "ulysses, double": {"ulysses": 2, "generator": "double", "ranks_per_node": 6},
}
MASKS: dict[str, ra.Mask] = {
    "full": ra.Full(),
    "causal": ra.Causal(),
    "window": ra.Causal() & ra.Window(13, 0),
    "documents": ra.Causal() & ra.Documents([0, 7, 30, 61]),
}


@dataclass
class Counted:
    """Of one rank of a real ring: bytes sent, and the most on loan from its pool."""

    sent: int = 0
    now: int = 0
    most: int = 0


def counted_call(group: ra.VirtualGroup, layout: ra.Layout, mask: ra.Mask, how: Any) -> Any:
    """Forward and backward; what each took."""
    count = counts[id(group.pool)] = counts[id(group)] = Counted()
    rows = layout.sizes[group.rank]
    q, k, v = (
        torch.randn(1, heads, rows, 16, requires_grad=True)
        for heads in (SHAPES.heads, SHAPES.kv_heads, SHAPES.kv_heads)
    )
    made = ra.plan(mask, layout, group=group, **how)
    out = ra.attention(q, k, v, plan=made, group=group)
    forward = count.sent, count.most
    count.sent, count.most = 0, count.now
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert count.now == 0
    return forward, (count.sent, count.most)


counts: dict[int, Counted] = {}  # by the id of a rank's group and of its pool


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    lease, give_back, post = BufferPool.lease, BufferPool.give_back, ra.VirtualGroup.post

    def leased(self: BufferPool, *args: Any, **kwargs: Any) -> Any:
        made = lease(self, *args, **kwargs)
        count = counts[id(self)]
        count.now += made.flat.numel() * made.flat.element_size()
        count.most = max(count.most, count.now)
        return made

    def returned(self: BufferPool, made: Any) -> None:
        counts[id(self)].now -= made.flat.numel() * made.flat.element_size()
        give_back(self, made)

    def posted(self: ra.VirtualGroup, messages: Any) -> Any:
        counts[id(self)].sent += sum(m.nbytes for m in messages if m.sending)
        return post(self, messages)

    monkeypatch.setattr(BufferPool, "lease", leased)
    monkeypatch.setattr(BufferPool, "give_back", returned)
    monkeypatch.setattr(ra.VirtualGroup, "post", posted)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_bytes_and_buffers_are_those_of_a_real_ring(mask: str, how: str) -> None:
    layout = ra.Zigzag(61, 6)
    measured = ra.run_virtual(6, counted_call, layout, MASKS[mask], SCHEDULES[how])
    for backward in (False, True):
        made = costs(MASKS[mask], layout, machine(Link("link", 1e9)), backward, **SCHEDULES[how])
        todo = [stages(c) for c in made]
        timelines = simulate(made, todo)
        sent, buffers = [t.sent_bytes for t in timelines], map(ring_bytes, made, todo)
        assert list(zip(sent, buffers, strict=True)) == [rank[backward] for rank in measured]
        assert sum(t.sent_bytes for t in timelines) == sum(t.received_bytes for t in timelines) > 0


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_computing_is_that_of_the_plans(mask: str, how: str) -> None:
    layout = ra.Zigzag(61, 6)
    for backward in (False, True):
        made = costs(MASKS[mask], layout, machine(Link("link", 1e9)), backward, **SCHEDULES[how])
        for c, t in zip(made, simulate(made, [stages(c) for c in made]), strict=True):
            steps = c.plan.backward_steps if backward else c.plan.steps
            heads = SHAPES.heads // c.plan.ulysses
            flops = sum(step.flops for step in steps) * 4 * heads * 16 * (2.5 if backward else 1)
            assert t.compute_s == pytest.approx(flops / 1e12)
            assert t.seconds == pytest.approx(t.compute_s + t.wait_s + t.post_s)
            spans = [(e.start_s, e.end_s) for e in t.events if e.name != "transfer"]
            assert all(a[1] <= b[0] + 1e-15 for a, b in pairwise(spans))


def test_break_even_in_closed_form() -> None:
    """c >= (G/H) F/W forward, 1.2 (G/H) F/W backward, both doubled for balanced causal masks."""
    m = machine(Link("link", 1e9))
    for heads, kv_heads, dim in ((32, 8, 128), (8, 8, 64), (16, 1, 80)):
        shapes = Shapes(heads, kv_heads, dim)
        ratio = kv_heads / heads * 1e12 / 1e9
        assert break_even(shapes, m) == pytest.approx((ratio, 1.2 * ratio))
        assert break_even(shapes, m, causal=True) == pytest.approx((2 * ratio, 2.4 * ratio))
    fp32 = Shapes(8, 8, 64, dtype="float32")
    assert break_even(fp32, m) == pytest.approx((2000, 1600))


@pytest.mark.parametrize("world_size", [4, 8])
def test_the_simulation_breaks_even_there(world_size: int) -> None:
    """Shards of the break-even length: no waiting above, as much as the formula says below."""
    m, shapes = machine(Link("link", 1e9)), Shapes(8, 8, 16)  # break-even at 1000 and 1200 tokens
    for tokens in (900, 1001, 1190, 1210):
        layout = ra.Contiguous(tokens * world_size, world_size)
        p = predict(ra.Full(), layout, shapes, m, generator="direct", traveller="kv")
        forward, backward = (max(t.wait_s for t in phase) for phase in (p.forward, p.backward))
        assert (forward > 1e-12) == (tokens < 1000)
        # The first K/V and the last gradients hide behind their parts of the own block.
        assert (backward > 1e-12) == (tokens < 1200)
    layout = ra.Contiguous(500 * world_size, world_size)
    p = predict(ra.Full(), layout, shapes, m, generator="direct", backward=False)
    fold_s, hop_s = 4 * 500**2 * 16 * 8 / 1e12, 2 * 500 * 8 * 16 * 2 / 1e9
    want = (world_size - 1) * max(fold_s, hop_s) + fold_s
    assert all(t.seconds == pytest.approx(want) for t in p.forward)
    assert p.exposed_s == pytest.approx((world_size - 1) * (hop_s - fold_s))


def test_latency_launches_and_theft() -> None:
    layout = ra.Contiguous(4000, 4)
    shapes = Shapes(8, 8, 16)
    slow = predict(
        ra.Full(),
        layout,
        shapes,
        machine(Link("l", 1e30, 5e-3)),
        generator="direct",
        traveller="kv",
    )
    plain = predict(
        ra.Full(), layout, shapes, machine(Link("l", 1e30)), generator="direct", traveller="kv"
    )
    fold_s = 4 * 1000**2 * 16 * 8 / 1e12
    assert plain.seconds == pytest.approx(4 * fold_s * 3.5)
    assert slow.forward[0].seconds == pytest.approx(3 * 5e-3 + fold_s)
    called = machine(Link("l", 1e30), launch_s=1e-3)
    launched = predict(ra.Full(), layout, shapes, called, generator="direct", traveller="kv")
    assert launched.seconds == pytest.approx(plain.seconds + 9e-3)  # 4 forward, 5 backward
    stealing = machine(Link("l", 1e30), cpu_s_per_byte=1e-9)
    stolen = predict(ra.Full(), layout, shapes, stealing, generator="direct", traveller="kv")
    moved = stolen.forward[0].sent_bytes + stolen.forward[0].received_bytes
    assert stolen.forward[0].stolen_s == pytest.approx(1e-9 * moved)
    assert "the transport takes" in stolen.explain() and "takes" not in plain.explain()


def test_a_double_ring_pays_where_nodes_are_far_apart() -> None:
    far = Machine("H100", "100G", node_link="NVLink", ranks_per_node=4)
    shapes = Shapes(32, 8, 128)
    layout = ra.Zigzag(16 * 8192, 16)
    seconds = {
        name: predict(ra.Causal(), layout, shapes, far, generator=name).seconds
        for name in ("direct", "chain", "double")
    }
    best = predict(ra.Causal(), layout, shapes, far, ulysses=1)
    assert seconds["double"] < 0.8 * min(seconds["direct"], seconds["chain"])
    assert best.schedule == {"generator": "double", "ranks_per_node": 4}
    assert ra.plan(ra.Causal(), layout, rank=3, **best.schedule).generator == "double"


def test_a_plan_is_chosen_by_prediction(tmp_path: Path) -> None:
    layout, shapes = ra.Zigzag(8 * 8192, 8), Shapes(32, 8, 128)
    m = Machine("H100", "100G", node_link="NVLink", ranks_per_node=4)
    problem: dict[str, Any] = {"shapes": shapes, "machine": m}
    plans = [ra.plan(ra.Causal(), layout, rank=r, ulysses=1, **problem) for r in (0, 5)]
    for made in plans:
        assert made.prediction is not None and made.generator == "double"
        assert made.digest == plans[0].digest and made.explain() == made.prediction.explain()
        how = made.prediction.schedule
        assert made == ra.plan(ra.Causal(), layout, rank=made.rank, **how)
    named = ra.plan(ra.Causal(), layout, rank=0, shapes=shapes, machine=m, generator="chain")
    assert named.generator == "chain" and "generator=chain" in named.explain()
    plain = ra.plan(ra.Causal(), layout, rank=0)
    assert plain.explain() == repr(plain)
    with pytest.raises(ValueError, match=r"Plan.draw: expected a plan with a prediction, got none"):
        plain.draw(tmp_path / "plan.png")
    with pytest.raises(ValueError, match=r"plan: expected both shapes and machine, got"):
        ra.plan(ra.Causal(), layout, rank=0, machine=m)
    with pytest.raises(ValueError, match=r"plan: expected ranks_per_node == 4, got 2"):
        ra.plan(ra.Causal(), layout, rank=0, shapes=shapes, machine=m, ranks_per_node=2)


def test_memory_decides() -> None:
    layout, shapes = ra.Zigzag(8 * 256, 8), Shapes(32, 8, 128)
    quick = machine(Link("l", 1e12), launch_s=1e-3)  # launches are dear: everything at once
    best = predict(ra.Causal(), layout, shapes, quick, ulysses=1)
    assert best.schedule == {"generator": "direct", "resident": 7}
    tight = predict(
        ra.Causal(), layout, shapes, quick, ulysses=1, memory_bytes=0.7 * best.memory_bytes
    )
    assert tight.schedule["resident"] < 7 and tight.memory_bytes <= 0.7 * best.memory_bytes
    with pytest.raises(ValueError, match=r"predict: expected a schedule within 1 KB per rank, got"):
        predict(ra.Causal(), layout, shapes, quick, memory_bytes=1000)


def test_a_sample_of_ranks_says_what_all_of_them_say(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, shapes, m = ra.Zigzag(24 * 4096, 24), Shapes(32, 8, 128), Machine("H100", "400G")
    whole = predict(ra.Causal(), layout, shapes, m, generator="direct")
    monkeypatch.setattr(predict_module, "WHOLE_RING", 8)
    sample = predict(ra.Causal(), layout, shapes, m, generator="direct")
    assert len(whole.ranks) == 24 and sample.ranks == [0, 3, 6, 9, 13, 16, 19, 23]
    assert sample.seconds == pytest.approx(whole.seconds, rel=0.03)
    assert sample.bytes_sent == whole.bytes_sent and sample.memory_bytes == whole.memory_bytes


def test_a_thousand_ranks() -> None:
    layout = ra.Zigzag(10_000_000, 1024)
    p = predict(ra.Causal(), layout, Shapes(32, 8, 128), Machine("H100", "400G"), generator="chain")
    assert p.ranks == [0, 341, 682, 1023] and p.memory_bytes < 2e9
    work_s = 10_000_000**2 / 2 * 4 * 32 * 128 / 1024 / 648e12
    assert work_s < p.forward[0].compute_s < 1.1 * work_s


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Machine: expected a device of \['A100'.*got 'TPU'"):
        Machine("TPU", "400G")
    with pytest.raises(ValueError, match=r"expected a link of .*got 'string'"):
        Machine("H100", "string")
    with pytest.raises(ValueError, match=r"node_link and ranks_per_node > 1 together, got"):
        Machine("H100", "400G", ranks_per_node=8)
    with pytest.raises(ValueError, match=r"Shapes: expected heads to be a multiple of kv_heads"):
        Shapes(8, 3, 64)
    with pytest.raises(ValueError, match=r"Shapes: expected a dtype of .*got 'fp8'"):
        Shapes(8, 8, 64, dtype="fp8")
    with pytest.raises(ValueError, match=r"Device: expected a dtype of .* for H100, got 'float32'"):
        predict(ra.Full(), ra.Contiguous(64, 2), SHAPES, Machine("H100", "400G"))


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


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    pytest.importorskip("matplotlib")
    words = f"--tokens 64K --gpus 8 --kv-heads 8 --device H100 --link 400G --draw {picture}"
    assert main(["plan", *words.split()]) == 0
    said = capsys.readouterr().out
    assert "65,536 tokens on 8 ranks" in said and "predicted by a simulation" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
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
    ],
)
def test_plan_command_refuses(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tokens", "64K", "--gpus", "4", *words.split()]) == 2
    assert message in capsys.readouterr().err


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


def test_examples() -> None:
    for name in ("predict", "costs", "figures"):
        module = importlib.import_module(f"ring_attention.{name}")
        assert doctest.testmod(module).failed == 0
