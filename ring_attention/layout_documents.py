# SPDX-License-Identifier: BSD-3-Clause
"""The layout for packed documents of mixed lengths: whole where they are short, split where long.

Note [document balance]. A document of n tokens costs about n^2 pairs: a few long ones are most of
the work, while the short ones are most of the tokens. Short documents go whole, the longest first,
to the rank with the fewest tokens; then the long ones are poured, the longest first, into the ranks
that lack most work. So a document is split only where a rank is full, over neighbouring ranks, and
zigzag inside: rows taken alike from its two ends are worth n/2 pairs each, wherever the cuts are,
so that uneven parts are balanced too. (For a full mask every row of it is worth the same anyway.)

Where the bound on tokens is tight, long documents that cost little per token would crowd it: these
are spread over the ranks first, to one level of tokens. What is "long" and what is "little" is
tried, from the fewest splits to the most, until the work is balanced.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise, product
from math import inf
from typing import Any

from .layout_base import Layout, Run
from .mask_algebra import at_least, integers, refuse

# Ranks are filled up to this much of the mean work: exactly the mean would cut more slivers.
_FULL = 1.02
# No part of a split document is less than this much of a rank's work and of its tokens.
_SLIVER = 0.02
# A short document looks at this many ranks, the emptiest first, before it is poured.
_LOOKS = 32
# Long: more than this much of a rank's share of the work. Little: less than this many times the
# mean work per token.
_LITTLE, _LONG = (0.0, 1.0, 1.5, 2.5, 4.0), (1.0, 0.5, 0.25, 0.125)

Piece = tuple[int, int]  # begin and end, global positions
Document = tuple[int, int]  # begin and length


@dataclass(frozen=True, init=False, repr=False)
class DocumentBalanced(Layout):
    """Packed documents: short ones whole on one rank, long ones split, the work alike on all ranks.

    Args:
        cu_seqlens: cumulative lengths [0, n0, n0 + n1, ...] of the documents, a list or a tensor;
            the last is the length of the layout.
        world_size: ranks, >= 1.
        slack: tokens per rank are at most slack * length / world_size, rounded up; >= 1. Less slack
            splits more documents, which costs bytes.
        window: keys that a query sees at most, itself included, where the mask has a window: the
            work of a long document then grows with its length, not with the square of it.

    Raises:
        ValueError: cu_seqlens that do not ascend from 0, slack or window below 1.

    Example:
        >>> layout = DocumentBalanced([0, 8, 10, 12], 2, slack=1)
        >>> [layout.positions(rank).tolist() for rank in range(2)]
        [[0, 1, 6, 7, 8, 9], [2, 3, 4, 5, 10, 11]]
    """

    length: int = field(init=False)
    cu_seqlens: tuple[int, ...]
    slack: float
    window: int | None

    def __init__(
        self, cu_seqlens: Any, world_size: int, slack: float = 1.25, window: int | None = None
    ) -> None:
        name = "DocumentBalanced"
        bounds = integers(name, "cu_seqlens", cu_seqlens)
        if bounds[:1] != (0,) or list(bounds) != sorted(bounds):
            refuse(name, "cu_seqlens that ascend from 0", str(bounds)[:80], "pass [0, n0, n0 + n1]")
        if not slack >= 1:
            refuse(name, "slack >= 1", slack, "the ranks must hold all tokens")
        if window is not None:
            at_least(name, "window", window, 1, "it counts the query itself, too")
        values = (bounds[-1], world_size, bounds, float(slack), window)
        for each, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, each.name, value)
        self.__post_init__()

    @property
    def max_tokens(self) -> int:
        """The bound on the tokens of a rank."""
        return -int(-self.slack * self.length // self.world_size)

    def runs(self, rank: int) -> list[Run]:
        return [(begin, end - begin, 1, 1) for begin, end in self._pieces[rank]]

    @cached_property
    def _pieces(self) -> list[list[Piece]]:
        """Of every rank, ascending."""
        tried: list[_Placement] = []
        for little, long in product(_LITTLE, _LONG):
            tried.append(_Placement(self, little, long))
            if tried[-1].imbalance <= _FULL + 1e-3:
                break
        best = min(tried, key=lambda placement: placement.imbalance)
        return [sorted(best.pieces[rank]) for rank in best.order]

    def __repr__(self) -> str:
        cu = self.cu_seqlens
        text = str(list(cu)) if len(cu) <= 8 else f"[{cu[0]}, {cu[1]}, ... {cu[-1]}]"
        window = "" if self.window is None else f", window={self.window}"
        return f"DocumentBalanced({text}, {self.world_size}, slack={self.slack}{window})"


class _Placement:
    """Documents on ranks, for one meaning of long and little."""

    def __init__(self, layout: DocumentBalanced, little: float, long: float) -> None:
        ranks = range(layout.world_size)
        self._window, self._max_tokens = layout.window, max(layout.max_tokens, 1)
        self.pieces: list[list[Piece]] = [[] for _ in ranks]
        self._work = [0.0 for _ in ranks]
        self._room = [layout.max_tokens for _ in ranks]
        # Heaps, the emptiest first; entries with an old key are passed over.
        self._by_work: list[tuple[float, int]] = [(0.0, rank) for rank in ranks]
        self._by_tokens: list[tuple[float, int]] = [(-layout.max_tokens, rank) for rank in ranks]

        cu = layout.cu_seqlens
        documents = [(b, e - b) for b, e in pairwise(cu) if b < e]
        documents.sort(key=lambda document: (-document[1], document[0]))
        work = max(sum(self._cost(n) for _, n in documents), 1.0)
        self._share = work / len(ranks)

        cheap = little * work / max(layout.length, 1)
        spread = sum(n for _, n in documents if self._cost(n) < cheap * n)
        level = min(int(_FULL * spread / len(ranks)) + 1, layout.max_tokens)
        first: list[Document] = []
        rest: list[Document] = []
        for begin, n in documents:
            large = self._cost(n) > long * self._share or n > level
            (first if large and self._cost(n) < cheap * n else rest).append((begin, n))
        poured = [rank for begin, n in first for rank in self._pour(begin, n, level)]
        for begin, n in self._place_short(rest, long * self._share):
            poured += self._pour(begin, n)
        # Ranks poured one after the other share a document: make them neighbours.
        self.order = list(dict.fromkeys([*poured, *ranks]))

    @property
    def imbalance(self) -> float:
        """The most work of a rank over the mean."""
        return max(self._work) / self._share

    def _cost(self, n: int) -> float:
        """Pairs of a document under a causal mask."""
        w = n if self._window is None else min(n, self._window)
        return w * (w + 1) / 2 + (n - w) * w

    def _place_short(self, documents: list[Document], most: float) -> list[Document]:
        """Places what costs at most `most` and fits, by tokens; returns the rest."""
        rest = []
        for begin, n in documents:
            cost = self._cost(n)
            skipped: list[tuple[float, int]] = []
            placed = False
            while cost <= most and not placed and self._by_tokens and len(skipped) < _LOOKS:
                key, rank = heapq.heappop(self._by_tokens)
                if key != -self._room[rank]:
                    continue
                if n <= self._room[rank] and self._work[rank] + cost <= _FULL * self._share:
                    self._add(rank, cost, (begin, begin + n))
                    placed = True
                else:
                    skipped.append((key, rank))
            if not placed:
                rest.append((begin, n))
            for entry in skipped:
                heapq.heappush(self._by_tokens, entry)
        return rest

    def _pour(self, begin: int, n: int, level: int | None = None) -> list[int]:
        """Splits a document over the ranks that lack most work; returns them in order.

        With a level: over those with the fewest tokens, up to that many.
        """
        first, last = begin, begin + n
        per_token = self._cost(n) / n
        held_back = 0 if level is None else self._max_tokens - level
        queue = self._by_work if level is None else self._by_tokens
        ranks: list[int] = []
        # The second time wherever there is room: then the bound on tokens is tight.
        for full, sliver, kept in ((_FULL * self._share, _SLIVER, held_back), (inf, 0.0, 0)):
            skipped = []
            while first < last and queue:
                key, rank = heapq.heappop(queue)
                if key != (self._work[rank] if level is None else -self._room[rank]):
                    continue  # there is a newer entry
                lacks = (full - self._work[rank]) / per_token
                rows = int(min(lacks, self._room[rank] - kept, last - first))
                part = max(rows * per_token / self._share, rows / self._max_tokens)
                if rows <= 0 or (rows < last - first and part < sliver):
                    skipped.append((key, rank))
                    if level is None and lacks * per_token < sliver * self._share:
                        break  # the others lack even less
                    continue
                front, back = rows // 2, rows - rows // 2
                self._add(rank, rows * per_token, (first, first + front), (last - back, last))
                first, last = first + front, last - back
                ranks.append(rank)
            for entry in skipped:
                heapq.heappush(queue, entry)
        assert first == last, "the ranks have room for all tokens"
        return ranks

    def _add(self, rank: int, cost: float, *pieces: Piece) -> None:
        self.pieces[rank] += [piece for piece in pieces if piece[0] < piece[1]]
        self._work[rank] += cost
        self._room[rank] -= sum(end - begin for begin, end in pieces)
        if self._room[rank] > 0:
            heapq.heappush(self._by_work, (self._work[rank], rank))
            heapq.heappush(self._by_tokens, (-self._room[rank], rank))
