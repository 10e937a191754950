# SPDX-License-Identifier: BSD-3-Clause
"""Binary trees over tiles, in which what pairs of tiles give is joined; Note [invariant]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from . import ops

T = TypeVar("T")
Value = tuple[Tensor, ...]  # of a tile: a state (acc, m, l), dq, or dk and dv


class Tree(Generic[T]):
    """A binary tree over tiles, joined from the leaves that exist up, in whatever order they come.

    Node 1 is the root, 2n and 2n + 1 are the halves of node n, ``count`` + t is the leaf of tile t.

    Args:
        count: of tiles, a power of two.
        tiles: those whose leaves exist.
        join: of a left and a right half.

    Attributes:
        pending: values of nodes that wait for their other half; of node 1 once all is joined.
    """

    def __init__(self, count: int, tiles: Iterable[int], join: Callable[[T, T], T]) -> None:
        self._count = count
        self._join = join
        self._exists = {(count + t) >> level for t in tiles for level in range(count.bit_length())}
        self.pending: dict[int, T] = {}

    def add(self, tile: int, value: T) -> None:
        """The value of a tile."""
        self.add_node(self._count + tile, value)

    def add_node(self, node: int, value: T) -> None:
        """The value of a node that was joined elsewhere."""
        while node > 1:
            other = node ^ 1
            if other in self._exists:
                if other not in self.pending:
                    break
                half = self.pending.pop(other)
                value = self._join(value, half) if node < other else self._join(half, value)
            node //= 2
        self.pending[node] = value


class Trees:
    """A tree per tile, over the tiles that it sees or that see it; buffers are used again.

    Args:
        make: a new buffer, unwritten.
        join: adds the second value to the first, in place.
    """

    def __init__(
        self,
        count: int,
        leaves: dict[int, list[int]],
        make: Callable[[], Value],
        join: Callable[[Value, Value], None],
    ) -> None:
        spare: list[Value] = []

        def joined(left: Value, right: Value) -> Value:  # without self: no cycle keeps buffers
            join(left, right)
            spare.append(right)
            return left

        self._make = make
        self._spare = spare
        self._trees = {tile: Tree(count, others, joined) for tile, others in leaves.items()}

    def __getitem__(self, tile: int) -> Tree[Value]:
        return self._trees[tile]

    def buffer(self) -> Value:
        return self._spare.pop() if self._spare else self._make()

    def zeros(self) -> Value:
        value = self.buffer()
        for x in value:
            x.zero_()
        return value

    def give_back(self, value: Value) -> None:
        self._spare.append(value)

    def take(self, tile: int) -> Value | None:
        """What a tree gives, when all of it is joined: once."""
        pending = self._trees[tile].pending
        return pending.pop(1) if 1 in pending else None

    def write(self, tile: int, outs: Sequence[Tensor]) -> None:
        """Writes what a tree gives, rounded, if all of it is joined."""
        if (value := self.take(tile)) is not None:
            for x, out in zip(value, outs, strict=True):
                out.copy_(x)
            self.give_back(value)


def add_sums(left: Value, right: Value) -> None:
    for x, y in zip(left, right, strict=True):
        x += y


def join_states(left: Value, right: Value) -> None:
    (acc, m, l), (other_acc, other_m, other_l) = left, right  # noqa: E741
    ops.combine_(acc, m, l, other_acc, other_m, other_l)
