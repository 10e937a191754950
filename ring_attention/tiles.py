# SPDX-License-Identifier: BSD-3-Clause
"""Canonical tiles: what makes a call the same bits for every number of ranks.

Note [invariant]. Floating-point sums depend on their order, and a ring's order on the number of
ranks. So the whole sequence is cut into tiles, whoever holds them, and the unit of work is a pair
of a query tile and a key tile, computed from zero: a kernel call whose shapes, intervals and values
know nothing of ranks. What pairs give is combined along binary trees over the tiles in global
order: states and dQ of a query tile over key tiles, dK/dV of a key tile over query tiles. A pair
that sees nothing does not exist, and a node with one half is that half: by the mask alone. The
order in which blocks arrive decides when halves are joined, never which.

Ranks hold whole tiles, so a block travels in whole tiles. The query tiles of a rank are few
subtrees (contiguous: one, zigzag: two): their sums go home as they are, and the owner joins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from . import _planner
from .interval_cache import IntervalCache, key_intervals
from .layout import Contiguous, Layout
from .mask_algebra import refuse
from .steps import Step, Transfer, step_of
from .tree import Tree

DEFAULT_TILES = 16


@dataclass(frozen=True)
class Tiles:
    """The tiles of a call; see Note [invariant].

    Attributes:
        count: of tiles, of queries as of keys.
        q_rows, k_rows: rows of a tile.
        q_held, k_held: per rank the tiles that its shard is made of.
        pairs: per query tile and key tile, how many query-key pairs are visible.
    """

    count: int
    q_rows: int
    k_rows: int
    q_held: tuple[tuple[int, ...], ...]
    k_held: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, ...], ...]
    _reads: _planner.Reads = field(repr=False, compare=False)
    _cache: IntervalCache = field(default_factory=IntervalCache, repr=False, compare=False)
    _home: dict[tuple[int, int], list[tuple[int, int]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def seen_by(self, i: int) -> list[int]:
        """The key tiles that query tile i sees."""
        return [j for j, pairs in enumerate(self.pairs[i]) if pairs]

    def viewers(self, j: int) -> list[int]:
        """The query tiles that see key tile j."""
        return [i for i, row in enumerate(self.pairs) if row[j]]

    def intervals(self, i: int, j: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What query tile i sees of key tile j, as in Plan.intervals."""
        key = i * self.count + j, device, None
        cached = self._cache.get(key)
        if cached is None:
            whole = _planner.Ranges([(0, self.k_rows)])
            cached = self._cache.put(key, key_intervals(self._reads, i, j, whole), self.q_rows)
        return cached

    def places(self, origin: int, held: _planner.Ranges) -> dict[int, int]:
        """Where the key tiles of a block as held begin, by tile."""
        rows, places, at = self.k_rows, {}, 0
        for begin, end in held.tuples():
            for number in range(begin // rows, end // rows):
                places[self.k_held[origin][number]] = at
                at += rows
        return places

    def to_fold(self, rank: int, keys: Iterable[int]) -> list[tuple[int, int]]:
        """The pairs of a rank's query tiles and some key tiles that exist.

        In the order of a forward: a query tile's state is whole soonest.
        """
        return [(i, j) for i in self.q_held[rank] for j in sorted(keys) if self.pairs[i][j]]

    def to_fold_backward(self, rank: int, keys: Iterable[int]) -> list[tuple[int, int]]:
        """The same, quarter by quarter: then sums of both kinds of tiles are whole soon.

        Of a square of tiles no more than one dQ and two dK/dV per row wait, however many tiles
        there are; row by row of tiles it would be log2(count) dK/dV.
        """
        levels = range(self.count.bit_length())

        def place(pair: tuple[int, int]) -> int:  # on a Z-order curve
            i, j = pair
            return sum((i >> b & 1) << 2 * b + 1 | (j >> b & 1) << 2 * b for b in levels)

        return sorted(self.to_fold(rank, keys), key=place)

    def going_home(self, rank: int, origin: int) -> list[tuple[int, int]]:
        """What a rank has for the keys of another: (key tile, node of its tree), in message order.

        Each is k_rows rows of the message.
        """
        nodes = self._home.get((rank, origin))
        if nodes is None:
            nodes = []
            for j in self.k_held[origin]:
                tree: Tree[None] = Tree(self.count, self.viewers(j), lambda left, right: None)
                for i in self.q_held[rank]:
                    if self.pairs[i][j]:
                        tree.add(i, None)
                nodes += [(j, node) for node in sorted(tree.pending)]
            self._home[rank, origin] = nodes
        return nodes

    def whole(self, rows: int) -> int:
        """The nearest number of rows that is a number of whole key tiles."""
        return self.k_rows * round(rows / self.k_rows)

    def steps(
        self, q_layout: Layout, k_layout: Layout, rank: int, generator: str, resident: int
    ) -> tuple[Step, ...]:
        """A rank's steps, with blocks and gradients in whole tiles."""
        reads = _planner.Reads([self._as_mask(q_layout, k_layout)], q_layout.table, k_layout.table)

        def home(transfer: Transfer, rank: int) -> Transfer:
            rows = self.k_rows * len(self.going_home(rank, transfer.origin))
            return replace(transfer, ranges=_planner.Ranges([(0, rows)]))

        steps = map(step_of, reads.schedule(rank, generator, resident, 1, False))
        return tuple(
            replace(
                step,
                grad_sends=tuple(home(t, rank) for t in step.grad_sends),
                grad_recvs=tuple(home(t, t.peer) for t in step.grad_recvs),
                flops=sum(
                    self.pairs[i][j]
                    for origin in step.folds
                    for i, j in self.to_fold(rank, self.k_held[origin])
                ),
            )
            for step in steps
        )

    def _as_mask(self, q_layout: Layout, k_layout: Layout) -> _planner.Segments:
        """A mask with which every query of a tile sees all keys of the tiles that the tile sees."""
        lengths = q_layout.length, k_layout.length
        each: list[list[tuple[int, int, int, int, int, int]]] = [[] for _ in range(self.count)]
        for i in range(self.count):
            for n, j in enumerate(self.seen_by(i)):
                lo, hi = j * self.k_rows, (j + 1) * self.k_rows
                each[n].append((i * self.q_rows, (i + 1) * self.q_rows, lo, 0, hi, 0))
        tables = (_planner.Segments(*lengths, rows) for rows in each)
        return reduce(_planner.Segments.__or__, tables)


def tile_count(invariant: bool | int) -> int:
    """How many tiles an argument ``invariant`` asks for; 0: none."""
    if invariant is True:
        return DEFAULT_TILES
    if invariant is False:
        return 0
    if not isinstance(invariant, int) or invariant < 2 or invariant & (invariant - 1):
        expected = "invariant to be True, False or a power of two >= 2"
        remedy = f"it counts the tiles that a sequence is cut into; True is {DEFAULT_TILES}"
        refuse("plan", expected, repr(invariant), remedy)
    return invariant


def tiles_of(
    count: int, samples: Sequence[_planner.Segments], q_layout: Layout, k_layout: Layout
) -> Tiles:
    """The tiles of a call.

    Raises:
        ValueError: a shard is not made of whole tiles.
    """
    q_tiles, k_tiles = _cut("q_layout", q_layout, count), _cut("k_layout", k_layout, count)
    reads = _planner.Reads(samples, q_tiles.table, k_tiles.table)
    return Tiles(
        count,
        q_tiles.sizes[0],
        k_tiles.sizes[0],
        _held("q_layout", q_layout, count),
        _held("k_layout", k_layout, count),
        tuple(tuple(reads.pairs(i, j) for j in range(count)) for i in range(count)),
        reads,
    )


def _cut(name: str, layout: Layout, count: int) -> Layout:
    if layout.length == 0 or layout.length % count:
        expected = f"{name}.length to be a multiple of the {count} tiles of invariant"
        remedy = "pad the sequence (KeyLength hides the padding), or pass invariant=2, 4, 8, ..."
        refuse("plan", expected, layout.length, remedy)
    return Contiguous(layout.length, count)


def _held(name: str, layout: Layout, count: int) -> tuple[tuple[int, ...], ...]:
    """The tiles of every rank."""
    rows = layout.length // count
    held = []
    for rank in range(layout.world_size):
        tiles: list[int] = []
        at = 0  # the position that the next row of the shard has to have
        for start, block, stride, rounds in layout.runs(rank):
            if block == stride:
                block, rounds = block * rounds, min(rounds, 1)
            for begin in range(start, start + rounds * stride, stride) if block else ():
                if (at % rows and begin != at) or (not at % rows and begin % rows):
                    _refuse_cut(name, layout, count, rank, begin)
                at = begin + block
                tiles += range(-(-begin // rows), -(-at // rows))
        if at % rows:
            _refuse_cut(name, layout, count, rank, at)
        held.append(tuple(tiles))
    return tuple(held)


def _refuse_cut(name: str, layout: Layout, count: int, rank: int, at: int) -> None:
    rows = layout.length // count
    expected = f"{name} to be cut at tiles of {rows} positions with invariant={count}"
    got = f"{layout!r}, of which rank {rank} is cut at position {at}"
    remedy = f"Contiguous on up to {count} ranks and Zigzag on up to {count // 2} are, where P is a"
    refuse("plan", expected, got, f"{remedy} power of two")
