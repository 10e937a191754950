# SPDX-License-Identifier: BSD-3-Clause
"""Plans run with position ids in place of rows, all ranks against each other."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ring_attention.layout import Layout
from ring_attention.mask import (
    Mask,
)
from ring_attention.plan import Plan, plan
from ring_attention.steps import Step, Transfer, last_due


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
