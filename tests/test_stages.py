# SPDX-License-Identifier: BSD-3-Clause
"""What is predicted of plans, against real rings of virtual ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

import ring_attention as ra
from ring_attention.buffers import BufferPool
from ring_attention.costs import Costs
from ring_attention.figures import Device, Link, Machine
from ring_attention.shapes import Shapes
from ring_attention.simulate import simulate
from ring_attention.stages import ring_bytes, stages

SHAPES = Shapes(12, 6, 16, dtype="float32")


RATES = {"float32": 1e12}
# Nothing costs time but the kernels and the link.
MACHINE = Machine(Device("test", RATES, RATES, 1e12, 1e30), Link("link", 1e9))


def costs(mask: ra.Mask, layout: ra.Layout, backward: bool, **how: Any) -> list[Costs]:
    plans = [ra.plan(mask, layout, rank=r, **how) for r in range(layout.world_size)]
    return [Costs(p, SHAPES, MACHINE, backward) for p in plans]


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
    assert_as_measured(MASKS[mask], ra.Zigzag(61, 6), SCHEDULES[how])


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("how", [{"generator": "chain"}, {"resident": 2}], ids=repr)
def test_bytes_and_buffers_of_tiles_too(mask: str, how: dict[str, Any]) -> None:
    assert_as_measured(MASKS[mask], ra.Zigzag(64, 4), {"invariant": 8, **how})


def assert_as_measured(mask: ra.Mask, layout: ra.Layout, how: dict[str, Any]) -> None:
    measured = ra.run_virtual(layout.world_size, counted_call, layout, mask, how)
    for backward in (False, True):
        made = costs(mask, layout, backward, **how)
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
        made = costs(MASKS[mask], layout, backward, **SCHEDULES[how])
        for c, t in zip(made, simulate(made, [stages(c) for c in made]), strict=True):
            steps = c.plan.backward_steps if backward else c.plan.steps
            heads = SHAPES.heads // c.plan.ulysses
            flops = sum(step.flops for step in steps) * 4 * heads * 16 * (2.5 if backward else 1)
            assert t.compute_s == pytest.approx(flops / 1e12)
            assert t.seconds == pytest.approx(t.compute_s + t.wait_s + t.post_s)
            spans = [(e.start_s, e.end_s) for e in t.events if e.name != "transfer"]
            assert all(a[1] <= b[0] + 1e-15 for a, b in pairwise(spans))
