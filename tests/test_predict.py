# SPDX-License-Identifier: BSD-3-Clause
"""Predictions: in closed form where there is one, and what is chosen."""

from __future__ import annotations

import doctest
import importlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import ring_attention as ra
from ring_attention.costs import break_even
from ring_attention.figures import Device, Link, Machine
from ring_attention.predict import predict
from ring_attention.shapes import Shapes

# The package's attributes of these names are functions.
predict_module = importlib.import_module("ring_attention.predict")


SHAPES = Shapes(12, 6, 16, dtype="float32")


def machine(link: Link, launch_s: float = 0.0, cpu_s_per_byte: float = 0.0) -> Machine:
    """Nothing costs time but the kernels, the link, and what is asked for."""
    rates = {"bfloat16": 1e12, "float32": 1e12}
    return Machine(Device("test", rates, rates, 1e12, 1e30, launch_s, cpu_s_per_byte), link)


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


PROBLEMS: dict[str, tuple[ra.Mask, ra.Layout, ra.Layout, Shapes, Machine]] = {
    "heads to deal": (
        ra.Causal(),
        ra.Zigzag(8 * 2048, 8),
        ra.Zigzag(8 * 2048, 8),
        Shapes(32, 8, 128),
        Machine("H100", "100G", node_link="NVLink", ranks_per_node=4),
    ),
    "one K/V head": (
        ra.Causal() & ra.Window(3000, 0),
        ra.Contiguous(8 * 2048, 8),
        ra.Contiguous(8 * 2048, 8),
        Shapes(8, 1, 128),
        Machine("A100", "100G"),
    ),
    "as many K/V heads": (
        ra.Full(),
        ra.Contiguous(5 * 2048, 5),
        ra.Contiguous(5 * 2048, 5),
        Shapes(16, 16, 64),
        Machine("H100", "200G"),
    ),
    "few queries": (
        ra.Full(),
        ra.Contiguous(6 * 16, 6),
        ra.Contiguous(6 * 8192, 6),
        Shapes(16, 4, 128),
        Machine("H100", "10G"),
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_chosen_schedule_is_the_best_of_all(name: str) -> None:
    mask, q_layout, k_layout, shapes, m = PROBLEMS[name]
    world, nodes = q_layout.world_size, m.ranks_per_node

    def named(**how: Any) -> ra.Prediction:
        return predict(mask, q_layout, shapes, m, k_layout=k_layout, **how)

    every = []
    for ulysses in (n for n in range(1, world + 1) if world % n == shapes.kv_heads % n == 0):
        every.append(named(generator="chain", ulysses=ulysses))
        if nodes > ulysses:
            every.append(named(generator="double", ulysses=ulysses))
        for resident, both in product((1, 2, 4, max(world // ulysses - 1, 1)), BOTH):
            every.append(
                named(generator="direct", resident=resident, ulysses=ulysses, traveller=both)
            )
    best = named()
    assert best.seconds <= 1.01 * min(p.seconds for p in every)
    like_it = [p for p in every if p.schedule == best.schedule]
    assert like_it and like_it[0].seconds == best.seconds
    assert {repr(c.schedule) for c in best.candidates} <= {repr(p.schedule) for p in every}
    assert best.seconds <= 1.01 * best.candidates[0].seconds
    if name == "few queries":
        assert best.traveller == ("q", "q") and "q/q travel" in best.explain()
    if name == "heads to deal":
        assert best.ulysses > 1 and f"ulysses={best.ulysses}" in best.explain()
    made = ra.plan(mask, q_layout=q_layout, k_layout=k_layout, rank=1, shapes=shapes, machine=m)
    assert made.prediction is not None and made.prediction.schedule == best.schedule
    assert (made.ulysses, made.traveller) == (best.ulysses, best.traveller)


BOTH = tuple(product(("kv", "q"), ("kv", "q")))


def test_dealing_heads_in_closed_form() -> None:
    """Ulysses alone: q, k, v go and out, lse come back, nothing hides them, the work is shared."""
    layout, shapes = ra.Contiguous(4 * 1000, 4), Shapes(8, 8, 16)
    p = predict(ra.Full(), layout, shapes, machine(Link("l", 1e9)), ulysses=4)
    share = 1000 * 2 * 16 * 2  # bytes of q, k, v or out: rows of a rank, two heads
    lse = 1000 * 2 * 4
    there, back = 3 * 3 * share / 1e9, 3 * (share + lse) / 1e9  # three peers, one after another
    work_s = 4 * 4000**2 * 16 * 2 / 1e12
    for phase, factor in ((p.forward, 1.0), (p.backward, 2.5)):
        for t in phase:
            assert t.compute_s == pytest.approx(factor * work_s)
            assert t.wait_s == pytest.approx(there + back)
            assert t.sent_bytes == t.received_bytes == pytest.approx(1e9 * (there + back))


def test_queries_that_travel_in_closed_form() -> None:
    """16 queries per rank over 10,000 keys: their hop hides behind the fold of what stays."""
    q_layout, k_layout = ra.Contiguous(4 * 16, 4), ra.Contiguous(4 * 10_000, 4)
    shapes, m = Shapes(8, 8, 64), machine(Link("l", 1e9))
    keys_forward, keys_backward = break_even(shapes, m, traveller=("q", "q"))
    moved = 64 * 2 + (64 + 2) * 4, (64 + 64) * 2 + 2 * 4 + 64 * 4  # Q and state; Q, dO, stats, dQ
    assert keys_forward == pytest.approx(moved[0] * 1e12 / (4 * 64 * 1e9))
    assert keys_backward == pytest.approx(moved[1] * 1e12 / (2.5 * 4 * 64 * 1e9))
    p = predict(ra.Full(), q_layout, shapes, m, k_layout=k_layout, generator="direct")
    assert p.traveller == ("q", "q") and keys_forward < 10_000 and keys_backward < 10_000
    assert p.exposed_s == pytest.approx(0.0, abs=1e-12)
    assert p.bytes_sent == 3 * 16 * 8 * sum(moved)


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
    layout, m = ra.Contiguous(64, 4), machine(Link("l", 1e9))
    with pytest.raises(ValueError, match=r"expected ulysses to divide kv_heads = 6, got 4"):
        predict(ra.Full(), layout, SHAPES, m, ulysses=4)
    with pytest.raises(ValueError, match=r"plan: expected ulysses of \[1, 2, 4\], got 3"):
        predict(ra.Full(), layout, SHAPES, m, ulysses=3)
    with pytest.raises(ValueError, match=r'plan: expected traveller "kv" with chain, got'):
        predict(ra.Full(), layout, SHAPES, m, generator="chain", traveller="q")
    with pytest.raises(ValueError, match=r"both shapes and machine, got .*'machine': None"):
        ra.plan(ra.Full(), layout, rank=0, shapes=SHAPES, memory_bytes=1e9)
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


def test_examples() -> None:
    for name in ("predict", "costs", "figures"):
        module = importlib.import_module(f"ring_attention.{name}")
        assert doctest.testmod(module).failed == 0
