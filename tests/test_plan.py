# SPDX-License-Identifier: BSD-3-Clause
"""Plans against brute force: all ranks' plans are run with position ids in place of K/V rows."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import random
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_attention import interval_cache
from ring_attention.layout import LAYOUTS, Contiguous, Layout, Striped, Zigzag
from ring_attention.mask import (
    MASKS,
    Causal,
    Chunks,
    Documents,
    FirstTokens,
    Full,
    KeyLength,
    Mask,
    Window,
)
from ring_attention.plan import GENERATORS, Plan, plan
from ring_attention.steps import Step, Transfer, last_due
from strategies import layouts, masks

# The package's attribute of this name is the function.
plan_module = importlib.import_module("ring_attention.plan")


@dataclass
class Message:
    """One side of a message, with its place in the order in which all ranks post."""

    kind: str
    transfer: Transfer
    rows: Tensor  # global positions: those sent, or those that the receiver expects
    sums: Tensor | None = None  # of gradients: how many pairs they are summed over
    matched: bool = False

    @property
    def place(self) -> tuple[int, int]:
        hop = self.transfer.hop
        return (hop, 0) if self.kind == "kv" else (hop + 1, 1)


class Wire:
    """Matches the two sides of messages by order alone, like NCCL, and without buffers."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[int, int, bool], deque[Message]] = defaultdict(deque)
        self.matches = 0

    def post(self, source: int, to: int, sending: bool, message: Message) -> None:
        others = self.waiting[source, to, not sending]
        if not others:
            self.waiting[source, to, sending].append(message)
            return
        other = others.popleft()
        assert other.place == message.place and other.transfer.origin == message.transfer.origin
        assert other.transfer.due == message.transfer.due
        assert torch.equal(other.rows, message.rows)
        message.sums = other.sums = message.sums if sending else other.sums
        other.matched = message.matched = True
        self.matches += 1


def take(block: Tensor, transfer: Transfer) -> Tensor:
    rows = transfer.rows
    assert rows and all(0 <= a < b <= len(block) for a, b in rows)
    assert all(end < begin for (_, end), (begin, _) in pairwise(rows))
    taken = torch.cat([block[a:b] for a, b in rows])
    assert torch.equal(taken, block[transfer.index()]) and len(taken) == transfer.num_rows
    return taken


def most_held(p: Plan) -> int:
    """Blocks in memory at once: the own one, those that are read, and as many that arrive."""
    travelling = (
        4 if p.generator == "double" else 2
    )  # one kept by the node in a round, and the next
    return 1 + travelling * p.resident


def run_rank(p: Plan, wire: Wire, folded: Tensor) -> Iterator[None]:
    """Runs one plan as the ring's backward does, which sends all there is; yields when it waits.

    `folded` [B, q_len, k_len] counts how often each pair was folded.
    """
    layout = p.q_layout if p.traveller[1] == "q" else p.k_layout
    keys = [layout.positions(r) for r in range(p.world_size)]  # or queries, if they travel
    held = {p.rank: keys[p.rank]}
    arriving: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}  # gradients as the number of pairs behind every row as held
    positions = {p.rank: keys[p.rank]}  # of every block held so far
    sums[p.rank] = torch.zeros(len(keys[p.rank]), dtype=torch.int64)
    under_way: list[Message] = []

    def post(step: Step | None, previous: Step | None) -> None:
        batch = []
        for t in step.sends if step else ():
            batch.append((True, Message("kv", t, take(held[t.origin], t))))
        for t in step.recvs if step else ():
            assert t.origin not in held and t.origin not in arriving
            arriving[t.origin] = positions[t.origin] = take(keys[t.origin], t)
            batch.append((False, Message("kv", t, arriving[t.origin])))
        for t in previous.grad_sends if previous else ():
            pairs = sums.pop(t.origin)
            assert torch.equal(pairs.nonzero()[:, 0], t.index()), "not only the rows touched"
            message = Message("grad", t, take(positions[t.origin], t), take(pairs, t))
            batch.append((True, message))
        for t in previous.grad_recvs if previous else ():
            batch.append((False, Message("grad", t, take(positions[t.origin], t))))
        for sending, message in sorted(batch, key=lambda pair: pair[1].place):
            peer = message.transfer.peer
            assert peer != p.rank and message.transfer.due >= message.place[0]
            wire.post(*((p.rank, peer) if sending else (peer, p.rank)), sending, message)
            under_way.append(message)

    def land(following: int) -> None:
        for message in [m for m in under_way if m.transfer.due < following]:
            under_way.remove(message)
            t = message.transfer
            if t in received and message.kind == "grad":
                assert message.sums is not None
                into = sums.setdefault(
                    t.origin, torch.zeros(len(positions[t.origin]), dtype=torch.int64)
                )
                into[t.index()] += message.sums
            elif t.origin in arriving:
                held[t.origin] = arriving.pop(t.origin)

    received = [t for s in p.steps for t in s.grad_recvs]
    previous: Step | None = None
    for n, step in enumerate(p.steps):
        following = p.steps[n + 1].number if n + 1 < len(p.steps) else step.number + 1
        post(step, previous)
        assert len(held) + len(arriving) <= most_held(p)
        for origin in step.folds:
            if p.traveller[1] == "q":
                pairs = fold_queries(p, origin, held[origin], folded)
            else:
                pairs = fold(p, origin, p.q_layout.positions(p.rank), held[origin], folded)
            sums[origin] = sums.get(origin, 0) + pairs
        while not all(m.matched for m in under_way if m.transfer.due < following):
            yield
        land(following)
        for origin in step.release:
            assert origin != p.rank
            del held[origin]
        previous = step
    post(None, previous)
    while not all(m.matched for m in under_way):
        yield
    land(last_due(p.steps) + 1)
    assert list(held) == [p.rank] and not under_way and not arriving
    assert list(sums) == [p.rank], "gradients that nobody sent home"
    dense = p.mask.dense(p.q_layout.length, p.k_layout.length)
    pairs = dense.sum((0, 2) if p.traveller[1] == "q" else (0, 1))
    assert torch.equal(sums[p.rank], pairs[keys[p.rank]])


def fold_queries(p: Plan, origin: int, block: Tensor, folded: Tensor) -> Tensor:
    """As fold, of travelling queries over the own keys."""
    begin, end = p.query_intervals(origin)
    keys = p.k_layout.positions(p.rank)
    assert begin.dtype == end.dtype == torch.int32 and begin.shape == end.shape
    assert begin.shape[2] == len(block) > 0
    assert bool(((begin >= 0) & (begin <= end) & (end <= len(keys))).all())
    rows = torch.arange(len(keys))
    seen = ((begin[..., None] <= rows) & (rows < end[..., None])).sum(0)
    seen = seen.expand(folded.shape[0], len(block), len(keys)).to(folded.dtype)
    assert bool(seen.any())
    folded[:, block[:, None], keys[None]] += seen
    return seen.sum((0, 2), dtype=torch.int64)


def fold(p: Plan, origin: int, queries: Tensor, block: Tensor, folded: Tensor) -> Tensor:
    """Counts what the key intervals let every query see; returns how many see each held row."""
    begin, end = p.intervals(origin)
    assert begin.dtype == end.dtype == torch.int32 and begin.shape == end.shape
    assert begin.shape[2] == len(queries) > 0 and begin.shape[1] in (1, folded.shape[0])
    assert bool(((begin >= 0) & (begin <= end) & (end <= len(block))).all())
    rows = torch.arange(len(block))
    seen = ((begin[..., None] <= rows) & (rows < end[..., None])).sum(0)
    assert bool(seen.any())
    seen = seen.expand(folded.shape[0], len(queries), len(block)).to(folded.dtype)
    folded[:, queries[:, None], block[None]] += seen
    return seen.flatten(0, 1).sum(0, dtype=torch.int64)


def run(plans: list[Plan]) -> Tensor:
    """Runs all ranks' plans against each other; returns how often each pair was folded."""
    p = plans[0]
    folded = torch.zeros(p.mask.batch, p.q_layout.length, p.k_layout.length, dtype=torch.int32)
    wire = Wire()
    ranks = [run_rank(plan, wire, folded) for plan in plans]
    while ranks:
        before = wire.matches
        running = [r for r in ranks if next(r, "done") != "done"]
        assert len(running) < len(ranks) or wire.matches > before, "ranks wait for each other"
        ranks = running
    assert not any(wire.waiting.values()), "messages that nobody received"
    return folded


def rows_seen(dense: Tensor, p: Plan, origin: int, readers: list[int]) -> int:
    """How many rows of a block some query of some reader sees."""
    queries = torch.cat([p.q_layout.positions(r) for r in readers])
    keys = p.k_layout.positions(origin)
    return int(dense[:, queries][:, :, keys].flatten(0, 1).any(0).sum())


def plans_of(mask: Mask, q: Layout, k: Layout, **how: Any) -> list[Plan]:
    return [plan(mask, q_layout=q, k_layout=k, rank=r, **how) for r in range(q.world_size)]


def schedules(generator: str, world: int) -> list[dict[str, Any]]:
    """The ways to run a generator on so many ranks, as arguments of plan."""
    if generator == "double":
        nodes = [n for n in range(2, world + 1) if world % n == 0]
        return [{"generator": generator, "ranks_per_node": n} for n in nodes]
    if generator == "direct":
        residents = [{"generator": generator, "resident": n} for n in {1, 2, 3, world}]
        return [residents[0], {"generator": generator, "traveller": "q"}, *residents[1:]]
    return [{"generator": generator}]


def check(mask: Mask, q: Layout, k: Layout, **how: Any) -> None:
    """Everything there is to say about the plans of all ranks."""
    plans = plans_of(mask, q, k, **how)
    dense = mask.dense(q.length, k.length)
    assert torch.equal(run(plans), dense.to(torch.int32)), (mask, q, k)
    assert len({p.digest for p in plans}) == 1
    shared = len(mask.segments(q.length, k.length)) == 1
    for p in plans:
        pairs = (dense[:1] if shared else dense)[:, q.positions(p.rank)]
        for step in p.steps:
            assert step.flops == sum(
                pairs_of(dense[:1] if shared else dense, p, o) for o in step.folds
            )
        own = pairs[:, :, k.positions(p.rank)].sum((0, 1)).cumsum(0)
        check_own_split(p, own)
        assert [s.number for s in p.steps] == sorted({s.number for s in p.steps})
        assert all(s.folds + s.sends + s.recvs + s.grad_sends + s.grad_recvs for s in p.steps[1:])


def pairs_of(dense: Tensor, p: Plan, origin: int) -> int:
    """Visible pairs of the fold of a block."""
    reader, keys = (origin, p.rank) if p.traveller[0] == "q" else (p.rank, origin)
    mine = dense[:, p.q_layout.positions(reader)]
    return int(mine[:, :, p.k_layout.positions(keys)].sum())


def check_own_split(p: Plan, done: Tensor) -> None:
    """The own block is split where its first part has the share of flops that K/V have of bytes."""
    first, last = p.steps[0], p.steps[-1]
    for kv_itemsize, grad_itemsize in ((2, 4), (4, 4)):
        kv = kv_itemsize * max(sum(t.num_rows for t in ts) for ts in (first.sends, first.recvs))
        ends = (last.grad_sends, last.grad_recvs)
        grad = grad_itemsize * max(sum(t.num_rows for t in ts) for ts in ends)
        split = p.own_split(kv_itemsize, grad_itemsize)
        if grad == 0:
            assert split == len(done)
            continue
        part = [0, *((kv + grad) * done).tolist()]  # times the bytes of both hops
        wanted = kv * (int(done[-1]) if len(done) else 0)
        assert part[split] >= wanted and (split == 0 or part[split - 1] < wanted)


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
        q = torch.empty(1, heads, q_len, 64, dtype=torch.bfloat16, device="meta")
        k = torch.empty(1, kv_heads, k_len, 64, dtype=torch.bfloat16, device="meta")
        layouts = {"q_layout": Contiguous(q_len, 2), "k_layout": Contiguous(k_len, 2)}
        return plan(Full(), **layouts, rank=0, traveller="auto", like=(q, k, k)).traveller

    assert chosen(64, 64, 8, 8) == ("kv", "q")  # as many heads: two thirds of the bytes
    assert chosen(64, 64, 8, 4) == ("kv", "kv")
    assert chosen(8, 4096, 32, 8) == ("q", "q")  # few queries over a long cache
    double = plan(
        Full(), Contiguous(64, 4), rank=0, ranks_per_node=2, traveller="auto",
        like=(torch.empty(1, 8, 16, 64, device="meta"),) * 3,
    )  # fmt: skip
    assert double.traveller == ("kv", "kv")
    assert plan(Full(), Contiguous(64, 4), rank=0, traveller=("q", "kv")).traveller == ("q", "kv")
    assert "q/kv travel" in repr(plan(Full(), Contiguous(8, 2), rank=0, traveller=("q", "kv")))


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


def steps_of(p: Plan) -> list[tuple[tuple[int, ...], list[Any], list[Any]]]:
    return [
        (s.folds, [(t.peer, t.rows) for t in s.sends], [(t.peer, t.rows) for t in s.recvs])
        for s in p.steps
    ]


def test_by_hand() -> None:
    window = plan(Window(2, 0), Contiguous(12, 3), rank=1)
    assert steps_of(window) == [
        ((1,), [(2, ((2, 4),))], [(0, ((2, 4),))]),
        ((0,), [], []),
    ]
    assert [t.rows for t in window.steps[1].grad_sends] == [((0, 2),)]
    assert [t.rows for s in window.steps for t in s.grad_recvs] == [((2, 4),)]
    assert window.steps[1].release == (0,)
    assert window.flops == (9, 3) and window.rows == (2, 0)
    begin, end = window.intervals(0)
    assert begin.tolist() == [[[0, 1, 0, 0]]] and end.tolist() == [[[2, 2, 0, 0]]]

    alone = plan(Causal() & Documents([0, 4, 8, 12]), Contiguous(12, 3), rank=1)
    assert steps_of(alone) == [((1,), [], [])]

    # Positions 0, 4, 8, 12 see 0, 2..4, 6..8, 10..12: rows of ranks 2 and 3, and none of rank 1.
    gaps = plan(Window(2, 0), Striped(16, 4), rank=0)
    assert sorted(o for s in gaps.steps for o in s.folds) == [0, 2, 3]

    first = plan(Causal(), Contiguous(4, 2), rank=0)
    assert steps_of(first) == [((0,), [(1, ((0, 2),))], [])]
    assert [t.peer for t in first.steps[0].grad_recvs + first.steps[-1].grad_recvs] == [1, 1]


def test_one_rank_and_nothing_at_all() -> None:
    p = plan(Causal(), Contiguous(5, 1))
    assert steps_of(p) == [((0,), [], [])] and p.flops == (15,)
    assert steps_of(plan(Causal(), Contiguous(0, 1))) == [((), [], [])]
    assert steps_of(plan(Causal() & KeyLength(0), Zigzag(9, 3), rank=2)) == [((), [], [])]
    cross = plan(Full(), q_layout=Contiguous(0, 2), k_layout=Contiguous(8, 2), rank=1)
    assert steps_of(cross) == [((), [], [])]


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


def test_uniform_rows_take_no_memory() -> None:
    p = plan(Full(), Zigzag(1 << 20, 4), rank=1)
    for origin in range(4):
        begin, end = p.intervals(origin)
        assert begin.shape == (1, 1, 1 << 18) and begin.stride(2) == end.stride(2) == 0
        assert begin.untyped_storage().nbytes() <= 64
        assert int(begin[0, 0, 0]) == 0 and int(end[0, 0, 0]) == 1 << 18
    padded = plan(KeyLength([5, 7]), Contiguous(16, 2), rank=1).intervals(0)
    assert [t[0, :, 0].tolist() for t in padded] == [[0, 0], [5, 7]] and padded[0].stride(2) == 0


def test_interval_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    p = plan(Causal(), Striped(4096, 8), rank=7)
    one = p.intervals(0)
    assert p.intervals(0)[0] is one[0]
    each = one[0].untyped_storage().nbytes()  # of begin and end
    monkeypatch.setattr(interval_cache, "INTERVAL_CACHE_BYTES", 3 * each)
    for origin in range(8):
        p.intervals(origin)
    assert [origin for origin, _, _ in p._cache.kept] == [5, 6, 7]
    again = p.intervals(0)
    assert again[0] is not one[0] and torch.equal(again[0], one[0])


def test_intervals_and_rows_are_moved_to_a_device_once() -> None:
    p = plan(Causal(), Striped(4096, 8), rank=7)
    device = torch.device("meta")
    begin, end = p.intervals(0, device)
    assert begin.device == end.device == device and begin.shape == p.intervals(0)[0].shape
    assert p.intervals(0, device)[0] is begin and p.intervals(0)[0].device.type == "cpu"
    transfer = p.steps[0].sends[0]
    assert transfer.index(device) is transfer.index(device)
    assert transfer.index().device.type == "cpu"


def test_intervals_of_some_keys() -> None:
    p = plan(Causal(), Contiguous(12, 2), rank=0)
    begin, end = p.intervals(0)
    for keys in ((0, 2), (2, 6)):
        some = p.intervals(0, keys=keys)
        assert torch.equal(some[0], begin.clamp(min=keys[0]))
        assert torch.equal(some[1], end.clamp(max=keys[1]))


def test_digest_is_the_same_everywhere() -> None:
    code = (
        "from ring_attention.plan import plan; from ring_attention.layout import Zigzag;"
        "from ring_attention.mask import Causal, Documents;"
        "print(plan(Causal() & Documents([0, 4, 9]), Zigzag(9, 3), rank=2).digest)"
    )
    here = plan(Causal() & Documents([0, 4, 9]), Zigzag(9, 3), rank=0).digest
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(there.stdout) == here and 0 <= here < 2**63


def test_digest_tells_plans_apart() -> None:
    documents = Causal() & Documents([0, 4, 9])
    plans = [
        plan(documents, Zigzag(9, 3), rank=0),
        plan(Causal() & Documents([0, 5, 9]), Zigzag(9, 3), rank=0),
        plan(documents, Zigzag(9, 3), rank=0, generator="chain"),
        plan(documents, Zigzag(9, 3), rank=0, resident=2),
        plan(documents, Zigzag(9, 3), rank=0, ulysses=3),
        plan(documents, Zigzag(9, 3), rank=0, traveller=("kv", "q")),
        plan(documents, Zigzag(9, 3), rank=0, ranks_per_node=3),
        plan(documents, Contiguous(9, 3), rank=0),
        plan(documents, Striped(9, 3), rank=0),
        plan(documents, Striped(9, 3, 2), rank=0),
        plan(documents, Zigzag(9, 1), rank=0),
        plan(documents, q_layout=Zigzag(9, 3), k_layout=Contiguous(9, 3), rank=0),
        plan(documents, q_layout=Contiguous(9, 3), k_layout=Zigzag(9, 3), rank=0),
    ]
    assert len({p.digest for p in plans}) == len(plans)
    assert plan(documents, Zigzag(9, 3), rank=0) == plans[0] != plans[1]


def test_plan_is_a_value_with_conveniences() -> None:
    p = plan(Causal(), Zigzag(8, 2), rank=1)
    assert torch.equal(p.positions(), Zigzag(8, 2).positions(1))
    assert p.shard({"x": torch.arange(8)[None]})["x"].tolist() == [[2, 3, 4, 5]]
    assert plan(Causal(), Zigzag(8, 1)).unshard(torch.arange(8.0)[None], None)[0, 3] == 3
    assert repr(p) == (
        "Plan(Causal(bottom_right=False) on Zigzag(length=8, world_size=2), direct, rank 1 of 2: "
        "2 steps, 18 pairs, 4 rows sent)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.rank = 0  # type: ignore[misc]
    assert int(p.handle[1]) == p.digest


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: plan(Causal()), "expected layout, or q_layout and k_layout"),
    (lambda: plan(Causal(), Zigzag(8, 2), k_layout=Zigzag(8, 2), rank=0), "expected layout, or q"),
    (lambda: plan(Causal(), q_layout=Zigzag(8, 2), rank=0), "expected a Layout as k_layout"),
    (lambda: plan(torch.ones(8, 8), Zigzag(8, 2), rank=0), "plan: expected a Mask"),  # type: ignore[arg-type]
    (lambda: plan(Causal(), Zigzag(8, 2)), "expected rank or group"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=2), r"expected a rank in \[0, 2\), got 2"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, generator="tree"), "generator of .*got 'tree'"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, resident=0), "resident"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, traveller="v"), "a traveller of .*got \"?'v'"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, traveller="auto"), "expected like with"),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, memory_bytes=1e9),
        "both shapes and machine",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, like=(torch.ones(1, 2, 8, 16),) * 3),
        'expected like only with traveller="auto"',
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, traveller="q", generator="chain"),
        'expected traveller "kv" with chain',
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, resident=2, generator="chain"),
        "expected resident == 1 with chain, got 2",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, resident=2, ranks_per_node=2),
        "expected resident == 1 with double, got 2",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 6), rank=0, ranks_per_node=4),
        r"expected ranks_per_node of \[2, 3, 6\] with double, got 4",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 6), rank=0, generator="double"),
        r"expected ranks_per_node of \[2, 3, 6\] with double, got None",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, generator="chain", ranks_per_node=2),
        "expected no ranks_per_node with chain, got 2",
    ),
    (
        lambda: plan(Full(), q_layout=Zigzag(8, 2), k_layout=Zigzag(8, 4), rank=0),
        r"layouts of one world size, got \(2, 4\)",
    ),
    (lambda: plan(Documents([0, 7]), Zigzag(8, 2), rank=0), "end at q_len = 8, got 7"),
    (lambda: plan(Full(), Contiguous(1 << 32, 2), rank=0), r"shards below 2\*\*31 rows"),
    (lambda: plan(Causal(), Contiguous(8, 2), rank=0).intervals(1), r"an origin of \[0\], got 1"),
]


@pytest.mark.parametrize("bad,message", BAD, ids=[message for _, message in BAD])
def test_refusals(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("make", LAYOUTS)
def test_planning_a_million_tokens_is_quick(
    make: Callable[[int, int], Layout], generator: str
) -> None:
    """10,000 documents on 64 ranks: about 0.2 s at worst, on one core that is otherwise idle."""
    length = 1 << 20
    cuts = sorted(random.Random(0).sample(range(1, length), 9999))
    mask, layout = Causal() & Documents([0, *cuts, length]), make(length, 64)
    start_s = time.process_time()
    p = plan(mask, layout, rank=17, **schedules(generator, 64)[-1])
    assert time.process_time() - start_s < 0.8
    assert sum(p.flops) > 0


def test_planning_does_not_depend_on_the_length() -> None:
    """64 billion tokens: nothing of the length's size is ever made."""
    mask = Causal() & (FirstTokens(4) | Window(4095, 0))
    for make in LAYOUTS:
        start_s = time.process_time()
        assert plan(mask, make(1 << 36, 64), rank=5).steps
        assert time.process_time() - start_s < 0.2


def test_examples() -> None:
    names = {"Causal": Causal, "Zigzag": Zigzag}
    assert doctest.testmod(plan_module, extraglobs=names).failed == 0
