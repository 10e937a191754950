# SPDX-License-Identifier: BSD-3-Clause
"""Layouts: which rank holds which positions of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .layout_base import Layout, Run
from .layout_documents import DocumentBalanced
from .mask_algebra import at_least

__all__ = ["LAYOUTS", "Contiguous", "DocumentBalanced", "Layout", "Run", "Striped", "Zigzag"]


def _even(length: int, parts: int, part: int) -> tuple[int, int]:
    """The begin and end of one of ``parts`` nearly equal chunks; the first ones are longer."""
    size, longer = divmod(length, parts)
    return part * size + min(part, longer), (part + 1) * size + min(part + 1, longer)


@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th of ``world_size`` chunks; their sizes differ by at most one."""

    def runs(self, rank: int) -> list[Run]:
        begin, end = _even(self.length, self.world_size, rank)
        return [(begin, end - begin, 1, 1)]


@dataclass(frozen=True)
class Zigzag(Layout):
    """Rank r holds chunks r and 2P - 1 - r of 2P: balanced for causal masks."""

    def runs(self, rank: int) -> list[Run]:
        chunks = 2 * self.world_size
        both = [_even(self.length, chunks, c) for c in (rank, chunks - 1 - rank)]
        return [(begin, end - begin, 1, 1) for begin, end in both]


@dataclass(frozen=True)
class Striped(Layout):
    """Blocks of ``block`` positions are dealt to the ranks in turn."""

    block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("Striped", "block", self.block, 1, "it counts positions")

    def runs(self, rank: int) -> list[Run]:
        stride = self.block * self.world_size
        rounds, rest = divmod(self.length, stride)
        tail = rounds * stride + rank * self.block
        rows = min(max(rest - rank * self.block, 0), self.block)
        return [(rank * self.block, self.block, stride, rounds), (tail, rows, 1, 1)]


# Every layout: tests run over this list.
LAYOUTS: tuple[Callable[[int, int], Layout], ...] = (
    Contiguous,
    Zigzag,
    Striped,
    lambda length, world_size: Striped(length, world_size, 3),
    lambda length, world_size: DocumentBalanced(
        [0, length // 9, length // 7, length // 2, length], world_size
    ),
)
