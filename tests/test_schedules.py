# SPDX-License-Identifier: BSD-3-Clause
"""Generators against brute force: what is folded, what is sent, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plan_run import check, plans_of, rows_seen, schedules
from ring_attention.layout import LAYOUTS, Contiguous, Layout, Striped, Zigzag
from ring_attention.mask import (
    MASKS,
    Causal,
    Chunks,
    Documents,
    FirstTokens,
    Full,
    Mask,
    Window,
)
from ring_attention.plan import GENERATORS, Plan, plan
from ring_attention.shapes import Shapes
from strategies import layouts, masks


def counted_rows(dense: Tensor, p: Plan) -> tuple[int, int]:
    """How many rows of K/V and of gradients a rank has to send, by brute force."""
    world, me, locals_ = p.world_size, p.rank, p.ranks_per_node

    def seen(origin: int, *readers: int) -> int:
        return rows_seen(dense, p, origin, list(readers))

    if p.traveller == ("q", "q"):

        def seen(origin: int, *readers: int) -> int:
            mine = dense[:, p.q_layout.positions(origin)]
            keys = torch.cat([p.k_layout.positions(r) for r in readers])
            return int(mine[:, :, keys].any(2).any(0).sum())

    others = [r for r in range(world) if r != me]
    if p.generator == "double":
        node = [r for r in range(world) if r // locals_ == me // locals_]
        column = [r for r in range(world) if r % locals_ == me % locals_]
        nodes = [[r for r in range(world) if r // locals_ == n] for n in range(world // locals_)]
        away = [ranks for ranks in nodes if me not in ranks]
        inside = sum(seen(o, r) for o in column for r in node if r != me)
        home = sum(seen(o, me) for o in range(world) if o % locals_ != me % locals_)
        crossing = sum(seen(me, *ranks) for ranks in away)
        return inside + crossing, home + sum(seen(o, *node) for o in column if o != me)
    home = sum(seen(o, me) for o in others)
    if p.generator == "direct":
        return sum(seen(me, r) for r in others), home
    onwards = [[(me + 1 + n) % world for n in range((o - me - 1) % world)] for o in range(world)]
    return sum(seen(o, *ranks) for o, ranks in enumerate(onwards) if ranks), home


def check_counts(mask: Mask, q: Layout, k: Layout, **how: Any) -> None:
    """Rows sent and pairs computed per rank are what the mask needs, and nothing more."""
    dense = mask.dense(q.length, k.length)
    distinct = dense[: len(mask.segments(q.length, k.length))]
    for p in plans_of(mask, q, k, **how):
        sent = sum(s.rows for s in p.steps), sum(s.grad_rows for s in p.steps)
        assert sent == counted_rows(dense, p), p
        if p.traveller[0] == "q":
            assert sum(p.flops) == int(distinct[:, :, k.positions(p.rank)].sum())
        else:
            assert sum(p.flops) == int(distinct[:, q.positions(p.rank)].sum())


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_every_mask_on_every_layout(
    mask: Mask, make: Callable[[int, int], Layout], generator: str
) -> None:
    for length, world in ((1, 1), (23, 2), (24, 3), (37, 4), (5, 8), (61, 6)):
        for how in schedules(generator, world)[:3]:
            check(mask, make(length, world), make(length, world), **how)


@st.composite
def problems(draw: st.DrawFn, generator: str) -> tuple[Mask, Layout, Layout, dict[str, Any]]:
    """A mask, layouts of queries and keys, and a way to run a generator."""
    world = draw(st.integers(2 if generator == "double" else 1, 9))
    q_len = draw(st.integers(0, 48))
    k_len = draw(st.one_of(st.just(q_len), st.integers(0, 48)))
    mask = draw(masks(q_len, k_len))
    how = draw(st.sampled_from(schedules(generator, world)))
    return mask, draw(layouts(q_len, world)), draw(layouts(k_len, world)), how


@pytest.mark.parametrize("generator", GENERATORS)
@settings(max_examples=150)
@given(data=st.data())
def test_random_masks_and_layouts(generator: str, data: st.DataObject) -> None:
    mask, q, k, how = data.draw(problems(generator))
    check(mask, q, k, **how)


@pytest.mark.parametrize("generator", GENERATORS)
@settings(max_examples=150)
@given(data=st.data())
def test_rows_and_pairs_by_brute_force(generator: str, data: st.DataObject) -> None:
    mask, q, k, how = data.draw(problems(generator))
    check_counts(mask, q, k, **how)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(9, 0)], ids=repr)
def test_a_double_ring_crosses_once_for_all_ranks_of_a_node(mask: Mask) -> None:
    """Every row to every other node that reads it, and its gradient back, once."""
    layout, dense = Contiguous(96, 8), mask.dense(96, 96)
    plans = plans_of(mask, layout, layout, ranks_per_node=4)
    nodes = ([0, 1, 2, 3], [4, 5, 6, 7])
    for kind in ("sends", "grad_sends"):
        crossing = [
            t.num_rows
            for p in plans
            for s in p.steps
            for t in getattr(s, kind)
            if t.peer // 4 != p.rank // 4
        ]
        needed = [rows_seen(dense, plans[0], origin, nodes[1 - origin // 4]) for origin in range(8)]
        assert sum(crossing) == sum(needed)
    if mask == Full():  # a plain ring crosses once for every rank
        assert sum(needed) == 96
        direct = plans_of(mask, layout, layout)
        assert (
            sum(
                t.num_rows
                for p in direct
                for s in p.steps
                for t in s.sends
                if t.peer // 4 != p.rank // 4
            )
            == 4 * 96
        )


def test_what_crosses_has_a_ring_inside_the_node_to_hide_behind() -> None:
    layout = Contiguous(96, 12)
    for p in plans_of(Full(), layout, layout, ranks_per_node=4):
        folded = {s.number for s in p.steps if s.folds}
        assert folded == set(range(12))
        for step in p.steps:
            for t in (*step.sends, *step.recvs):
                assert t.due - t.hop == (2 if t.peer // 4 != p.rank // 4 else 0)
            for t in (*step.grad_sends, *step.grad_recvs):
                assert t.due - t.hop == (3 if t.peer // 4 != p.rank // 4 else 1)


@pytest.mark.parametrize("resident", [1, 2, 3, 7, 100])
def test_resident_blocks_are_folded_together(resident: int) -> None:
    """Fewer, larger launches: ceil(7 / resident) besides that of the own block."""
    layout = Contiguous(80, 8)
    for p in plans_of(Full(), layout, layout, resident=resident):
        assert [len(s.folds) for s in p.steps] == [
            1,
            *[min(resident, 7 - n) for n in range(0, 7, resident)],
        ]
        assert sum(p.rows) == 70
        assert (p.generator == "direct" and f"{resident} resident" in repr(p)) or resident == 1


def test_what_travels_is_chosen_by_bytes() -> None:
    def chosen(q_len: int, k_len: int, heads: int, kv_heads: int) -> tuple[str, str]:
        layouts = {"q_layout": Contiguous(q_len, 2), "k_layout": Contiguous(k_len, 2)}
        return plan(Full(), **layouts, rank=0, shapes=Shapes(heads, kv_heads, 64)).traveller

    assert chosen(64, 64, 8, 8) == ("kv", "q")  # as many heads: two thirds of the bytes
    assert chosen(64, 64, 8, 4) == ("kv", "kv")
    assert chosen(8, 4096, 32, 8) == ("q", "q")  # few queries over a long cache
    alike = Contiguous(64, 4)
    shapes = Shapes(8, 8, 64)
    assert plan(Full(), alike, rank=0).traveller == ("kv", "kv")  # nothing is known of the rows
    alone = plan(Full(), q_layout=Contiguous(1, 1), k_layout=Contiguous(64, 1), shapes=shapes)
    assert alone.traveller == ("kv", "kv")
    double = plan(Full(), alike, rank=0, ranks_per_node=2, shapes=shapes)
    assert double.traveller == ("kv", "kv")
    dealt = plan(Full(), alike, rank=0, ulysses=2, shapes=shapes)
    assert dealt.traveller == ("kv", "q") and dealt.ring is not None
    assert plan(Full(), alike, rank=0, traveller=("q", "kv")).traveller == ("q", "kv")
    assert "q/kv travel" in repr(plan(Full(), alike, rank=0, traveller=("q", "kv")))


@settings(max_examples=60)
@given(data=st.data())
def test_what_travels_has_the_fewest_bytes(data: st.DataObject) -> None:
    """Counted from the plans of all ranks; up to four of them the planner counts all, too."""
    world, q_len, k_len = (
        data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 48), (1, 48))
    )
    mask = data.draw(masks(q_len, k_len))
    q, k = data.draw(layouts(q_len, world)), data.draw(layouts(k_len, world))
    kv_heads = data.draw(st.sampled_from((1, 2, 4)))
    shapes = Shapes(4, kv_heads, 32, data.draw(st.sampled_from((32, 64))), "bfloat16")
    made = [plan(mask, q_layout=q, k_layout=k, rank=r, shapes=shapes) for r in range(world)]
    assert len({p.traveller for p in made}) == 1
    clear, least = [], []
    for backward in (False, True):
        moved, unpruned = {}, {}
        for what, length in (("kv", k_len), ("q", q_len)):
            each = shapes.block_bytes(what, backward, 1) + shapes.home_bytes(what, backward, 1)
            plans = plans_of(mask, q, k, traveller=what)
            moved[what] = each * sum(sum(p.rows) for p in plans)
            unpruned[what] = each * length
        clear.append(not 0.5 < unpruned["q"] / unpruned["kv"] < 2.0)
        least.append((moved, unpruned))
    # Where lengths and heads say it by a factor of two, in both directions, masks are not asked.
    for chosen, sizes in zip(made[0].traveller, least, strict=True):
        counted = sizes[all(clear)]
        assert counted[chosen] == min(counted.values()), (sizes, made[0])


@pytest.mark.parametrize("mask", [Window(0, 0), Window(1, 1), Chunks(1)], ids=repr)
def test_rows_that_see_nothing_around_one_that_does(mask: Mask) -> None:
    """Of rank 0's queries 0, 1, 2 only the middle one sees the block of rank 1, key 1."""
    check(mask, Contiguous(7, 3), Contiguous(3, 3), generator="direct")


def test_rows_that_see_earlier_keys_than_those_before() -> None:
    """Rank 1's queries 4 and 5 see rank 0's last chunk, the next ones its first three keys."""
    late = Window(0, None) & Documents([0, 6, 16], [0, 16, 16])
    early = FirstTokens(3) & Documents([0, 6, 16], [0, 0, 16])
    check(late | early, Zigzag(16, 2), Zigzag(16, 2), generator="direct")


@settings(max_examples=150)
@given(data=st.data())
def test_counts_in_closed_form(data: st.DataObject) -> None:
    """Pairs over many rounds of stripes, with strides that match and that do not."""
    q_len = data.draw(st.integers(100, 400))
    k_len = data.draw(st.sampled_from([q_len, 251]))
    world = data.draw(st.integers(1, 4))
    mask = data.draw(masks(q_len, k_len))
    q = data.draw(layouts(q_len, world))
    k = q if k_len == q_len else data.draw(layouts(k_len, world))
    table = mask.segments(q_len, k_len)
    dense = mask.dense(q_len, k_len)[: len(table)]
    for p in plans_of(mask, q, k):
        mine = dense[:, q.positions(p.rank)]
        for step in p.steps:
            for origin in step.folds:
                assert step.flops == int(mine[:, :, k.positions(origin)].sum())


@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize("ahead", range(12))
def test_counts_at_every_offset_of_the_stripes(ahead: int, block: int) -> None:
    layout = Striped(60, 3, block)
    seen = Window(None, ahead).dense(60, 60)[0]
    for p in plans_of(Window(None, ahead), layout, layout):
        for step in p.steps:
            keys = torch.cat([layout.positions(o) for o in step.folds])
            assert step.flops == int(seen[layout.positions(p.rank)][:, keys].sum())


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(9, 0), Window(9, 9)], ids=repr)
@pytest.mark.parametrize("layout", [Zigzag(160, 8), Contiguous(160, 8), Striped(160, 8, 10)])
def test_transfers_hide(mask: Mask, layout: Layout) -> None:
    """Every block that arrives does so while another one is folded."""
    for p in plans_of(mask, layout, layout):
        for step in p.steps:
            assert step.folds or not step.recvs, (p, step)


@settings(max_examples=50)
@given(data=st.data())
def test_direct_never_sends_more_than_chain(data: st.DataObject) -> None:
    world, length = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 40))
    mask, layout = data.draw(masks(length, length)), data.draw(layouts(length, world))
    direct, chain = (
        sum(sum(p.rows) for p in plans_of(mask, layout, layout, generator=g))
        for g in ("direct", "chain")
    )
    assert direct <= chain
    assert plan(mask, layout, rank=0).generator == "direct"
