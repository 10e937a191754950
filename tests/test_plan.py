# SPDX-License-Identifier: BSD-3-Clause
"""Plans against brute force: all ranks' plans are run with position ids in place of K/V rows."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_attention.layout import LAYOUTS, Layout
from ring_attention.mask import (
    MASKS,
    Mask,
)
from ring_attention.plan import GENERATORS, Plan, Step, Transfer, plan
from strategies import layouts, masks


class Box:
    """Messages on their way, in order per (from, to, kind)."""

    def __init__(self) -> None:
        self.ways: dict[tuple[int, int, str], deque[Tensor]] = defaultdict(deque)
        self.moves = 0

    def put(self, way: tuple[int, int, str], message: Tensor) -> None:
        self.ways[way].append(message)
        self.moves += 1

    def take(self, way: tuple[int, int, str]) -> Tensor:
        self.moves += 1
        return self.ways[way].popleft()

    def __contains__(self, way: tuple[int, int, str]) -> bool:
        return bool(self.ways[way])


def take(block: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    assert rows and all(0 <= a < b <= len(block) for a, b in rows)
    assert all(end < begin for (_, end), (begin, _) in pairwise(rows))
    return torch.cat([block[a:b] for a, b in rows])


def run_rank(p: Plan, box: Box, folded: Tensor) -> Iterator[None]:
    """Runs one plan as the ring loop does; yields while a message is missing.

    The forward and the backward pass are run at once. `folded` [B, q_len, k_len] counts folds.
    """
    queries = p.q_layout.positions(p.rank)
    keys = [p.k_layout.positions(r) for r in range(p.world_size)]
    held = {p.rank: keys[p.rank]}
    late: list[tuple[Transfer, str]] = []

    def post(kind: str, transfers: tuple[Transfer, ...], blocks: dict[int, Tensor]) -> None:
        for t in transfers:
            assert t.peer != p.rank
            box.put((p.rank, t.peer, kind), take(blocks[t.origin], t.rows))

    def wait(kind: str, t: Transfer) -> Iterator[None]:
        while (t.peer, p.rank, kind) not in box:
            yield
        got = box.take((t.peer, p.rank, kind))
        assert torch.equal(got, take(keys[t.origin], t.rows)), (p, t)
        if kind == "kv":
            assert t.origin not in held
            held[t.origin] = got

    for step in p.steps:
        post("kv", step.sends, held)
        touched = {}
        for origin in step.folds:
            block = held[origin]
            touched[origin] = fold(p, origin, queries, block, folded)
        assert {t.origin for t in step.grad_sends} == set(step.folds) - {p.rank}
        for t in step.grad_sends:
            assert t.peer == t.origin
            rows = torch.cat([torch.arange(a, b) for a, b in t.rows])
            assert torch.equal(rows, touched[t.origin].nonzero()[:, 0]), (p, t)
        post("grad", step.grad_sends, held)
        for t, kind in late:
            yield from wait(kind, t)
        for t in step.recvs:
            yield from wait("kv", t)
        late = [(t, "grad") for t in step.grad_recvs]
        assert all(t.origin == p.rank for t in step.grad_recvs)
        for origin in step.release:
            assert origin != p.rank
            del held[origin]
        assert len(held) <= 3  # the own block and two travelling ones
    for t, kind in late:
        yield from wait(kind, t)
    assert list(held) == [p.rank]


def fold(p: Plan, origin: int, queries: Tensor, block: Tensor, folded: Tensor) -> Tensor:
    """Counts what the key intervals let every query see; returns which held rows were seen."""
    begin, end = p.intervals(origin)
    assert begin.dtype == end.dtype == torch.int32 and begin.shape == end.shape
    assert begin.shape[2] == len(queries) and begin.shape[1] in (1, folded.shape[0])
    assert bool(((begin >= 0) & (begin <= end) & (end <= len(block))).all())
    rows = torch.arange(len(block))
    seen = ((begin[..., None] <= rows) & (rows < end[..., None])).sum(0)
    seen = seen.expand(folded.shape[0], len(queries), len(block)).to(folded.dtype)
    folded[:, queries[:, None], block[None]] += seen
    assert len(block) > 0 and len(queries) > 0
    return seen.flatten(0, 1).any(0)


def run(plans: list[Plan]) -> Tensor:
    """Runs all ranks' plans against each other; returns how often each pair was folded."""
    p = plans[0]
    folded = torch.zeros(p.mask.batch, p.q_layout.length, p.k_layout.length, dtype=torch.int32)
    box = Box()
    ranks = [run_rank(plan, box, folded) for plan in plans]
    while ranks:
        before = box.moves
        running = [r for r in ranks if next(r, "done") != "done"]
        assert len(running) < len(ranks) or box.moves > before, "ranks wait for each other"
        ranks = running
    assert not any(box.ways.values()), "messages that nobody received"
    return folded


def expected_rows(dense: Tensor, p: Plan, origin: int, readers: list[int]) -> int:
    queries = torch.cat([p.q_layout.positions(r) for r in readers])
    keys = p.k_layout.positions(origin)
    return int(dense[:, queries][:, :, keys].flatten(0, 1).any(0).sum())


def check(mask: Mask, q: Layout, k: Layout, generator: str) -> None:
    world = q.world_size
    plans = [plan(mask, q_layout=q, k_layout=k, rank=r, generator=generator) for r in range(world)]
    dense = mask.dense(q.length, k.length)
    assert torch.equal(run(plans), dense.to(torch.int32)), (mask, q, k)
    assert len({p.digest for p in plans}) == 1
    shared = len(mask.segments(q.length, k.length)) == 1
    for p in plans:
        here = dense[:1] if shared else dense
        pairs = here[:, q.positions(p.rank)]
        for step in p.steps:
            count = sum(int(pairs[:, :, k.positions(o)].sum()) for o in step.folds)
            assert step.flops == count, (p, step)
            check_minimal(dense, p, step, generator)
        own = pairs[:, :, k.positions(p.rank)].sum((0, 1)).cumsum(0)
        total = int(own[-1]) if len(own) else 0
        half = [0, *(2 * own).tolist()]
        assert half[p.own_split] >= total and (p.own_split == 0 or half[p.own_split - 1] < total)
        assert all(s.folds + s.sends + s.recvs + s.grad_sends + s.grad_recvs for s in p.steps[1:])


def check_minimal(dense: Tensor, p: Plan, step: Step, generator: str) -> None:
    world = p.world_size
    for t in step.sends:
        if generator == "direct":
            readers = [t.peer]
        else:
            assert t.peer == (p.rank + 1) % world
            readers = [(t.peer + n) % world for n in range((t.origin - t.peer) % world)]
        assert t.num_rows == expected_rows(dense, p, t.origin, readers), (p, t)
    for t in step.grad_sends:
        assert t.num_rows == expected_rows(dense, p, t.origin, [p.rank])


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_every_mask_on_every_layout(mask: Mask, make: object, generator: str) -> None:
    for length, world in ((1, 1), (23, 2), (24, 3), (37, 4), (5, 8), (61, 7)):
        check(mask, make(length, world), make(length, world), generator)


@pytest.mark.parametrize("generator", GENERATORS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_masks_and_layouts(generator: str, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 8))
    q_len = data.draw(st.integers(0, 48))
    k_len = data.draw(st.one_of(st.just(q_len), st.integers(0, 48)))
    mask = data.draw(masks(q_len, k_len))
    check(mask, data.draw(layouts(q_len, world)), data.draw(layouts(k_len, world)), generator)
