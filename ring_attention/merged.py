# SPDX-License-Identifier: BSD-3-Clause
"""A layout whose ranks hold what several consecutive ranks of another layout hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, Run
from .mask_algebra import refuse


@dataclass(frozen=True)
class Merged(Layout):
    """What `degree` consecutive ranks of another layout hold together, as one rank.

    Args:
        base: that layout, for world_size * degree ranks.
        degree: a divisor of its world size.
    """

    base: Layout
    degree: int

    @staticmethod
    def of(base: Layout, degree: int) -> Merged:
        """The merged layout of base.world_size / degree ranks."""
        return Merged(base.length, base.world_size // degree, base, degree)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, dict):
            object.__setattr__(self, "base", Layout.from_dict(self.base))

    def runs(self, rank: int) -> list[Run]:
        members = range(rank * self.degree, (rank + 1) * self.degree)
        return _merge([run for r in members for run in self.base.runs(r)], self)

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"layout": "Merged", **fields, "base": self.base.to_dict()}


def _merge(runs: list[Run], layout: Merged) -> list[Run]:
    """Sorts runs; those that continue each other, in every round, become one."""
    merged: list[Run] = []
    filled = sorted((run for run in runs if run[1] * run[3] > 0), key=lambda run: (run[0], -run[3]))
    for start, block, stride, count in filled:
        if count == 1:
            stride = 1
        if merged:
            before, width, step, rounds = merged[-1]
            if before + width == start and (step, rounds) == (stride, count):
                merged[-1] = (before, width + block, step, rounds)
                continue
        merged.append((start, block, stride, count))
    for (start, block, stride, count), after in pairwise(merged):
        if start + (count - 1) * stride + block > after[0]:
            remedy = "Contiguous, Zigzag and Striped are"
            expected = f"a layout whose shards of {layout.degree} ranks merge into runs"
            refuse("plan", expected, repr(layout.base), remedy)
    return merged


def merges(layout: Layout, degree: int) -> bool:
    """Whether the shards of every `degree` consecutive ranks of a layout merge into runs."""
    merged = Merged.of(layout, degree)
    try:
        for rank in range(merged.world_size):
            merged.runs(rank)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=256)
def rows_of(layout: Layout, degree: int, rank: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Where the rows of `rank` are among the merged ones: as ranges and one by one."""
    merged = Merged.of(layout, degree).positions(rank // degree)
    index = torch.searchsorted(merged, layout.positions(rank))
    cuts = [0, *(torch.nonzero(index.diff() != 1)[:, 0] + 1).tolist(), len(index)]
    ranges = [(int(index[a]), int(index[b - 1]) + 1) for a, b in pairwise(cuts) if a < b]
    return ranges, index
