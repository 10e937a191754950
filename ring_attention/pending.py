# SPDX-License-Identifier: BSD-3-Clause
"""What waits in the trees of a call with ``invariant``, counted without running it."""

from __future__ import annotations

from collections.abc import Iterable

from .rank_plan import Plan
from .steps import Step, Transfer, last_due
from .tree import Tree


class _Count:
    """Buffers of a kind of values: of trees, and one that a pair is being computed into."""

    def __init__(self, count: int, leaves: dict[int, list[int]]) -> None:
        self.trees: dict[int, Tree[None]] = {
            tile: Tree(count, others, lambda left, right: None) for tile, others in leaves.items()
        }
        self.waiting = 0
        self.most = 0

    def add(self, tile: int, node: int, owned: bool = True) -> None:
        pending = self.trees[tile].pending
        before = len(pending)
        self.most = max(self.most, self.waiting + 1)
        self.trees[tile].add_node(node, None)
        if owned and 1 in pending:
            del pending[1]
        self.waiting += len(pending) - before

    def take(self, tile: int, node: int) -> None:
        del self.trees[tile].pending[node]
        self.waiting -= 1


def states(plan: Plan) -> int:
    """The most states of query tiles that the forward of a plan with tiles holds at one time."""
    tiles = plan.tiles
    assert tiles is not None
    count = _Count(tiles.count, {i: tiles.seen_by(i) for i in tiles.q_held[plan.rank]})
    for step in plan.steps:
        for i, j in tiles.to_fold(plan.rank, _keys(plan, step.folds)):
            count.add(i, tiles.count + j)
    return count.most


def sums(plan: Plan, split: int) -> tuple[int, int]:
    """The same of its backward: dQ of query tiles, and dK/dV of key tiles.

    Args:
        split: of the own keys, see Plan.own_split.
    """
    tiles, rank, steps = plan.tiles, plan.rank, plan.backward_steps
    assert tiles is not None
    dqs = _Count(tiles.count, {i: tiles.seen_by(i) for i in tiles.q_held[rank]})
    dkvs = _Count(tiles.count, {j: tiles.viewers(j) for j in range(tiles.count)})
    own = tiles.k_held[rank]
    first = split // tiles.k_rows

    def fold(keys: Iterable[int]) -> None:
        for i, j in tiles.to_fold_backward(rank, keys):
            dqs.add(i, tiles.count + j)
            dkvs.add(j, tiles.count + i, owned=j in own)

    previous: Step | None = None
    arriving: list[Transfer] = []
    ends = [*(step.number for step in steps[1:]), steps[-1].number + 1, last_due(steps) + 1]
    for step, end in zip((*steps, None), ends, strict=True):
        if previous is not None:
            arriving += previous.grad_recvs
            for t in previous.grad_sends:
                for j, node in tiles.going_home(rank, t.origin):
                    dkvs.take(j, node)
        if step is None:
            fold(own[first:] if any(rank in s.folds for s in steps) else ())
        else:
            fold(own[:first] if rank in step.folds else ())
            fold(_keys(plan, [origin for origin in step.folds if origin != rank]))
        for t in [t for t in arriving if t.due < end]:
            for j, node in tiles.going_home(t.peer, rank):
                dkvs.add(j, node)
        arriving = [t for t in arriving if t.due >= end]
        previous = step
    return dqs.most, dkvs.most


def _keys(plan: Plan, origins: Iterable[int]) -> list[int]:
    assert plan.tiles is not None
    return [j for origin in origins for j in plan.places(origin)]
