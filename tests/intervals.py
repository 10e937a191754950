# SPDX-License-Identifier: BSD-3-Clause
"""Masks of the operators' tests as intervals: int32 [n, batch or 1, q_len]."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]


def stacked(*bounds: Sequence[Tensor]) -> Interval:
    begin, end = (torch.stack(list(b)).to(torch.int32) for b in zip(*bounds, strict=True))
    return begin, end


def full(batch: int, q_len: int, k_len: int) -> Interval:
    return stacked((torch.zeros(1, 1).expand(1, q_len), torch.full((1, 1), k_len).expand(1, q_len)))


def causal(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((0 * rows, rows + 1))


def bottom_right(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((0 * rows, rows + 1 + k_len - q_len))


def window(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((rows - 9, rows + 6))


def documents(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((rows // 29 * 29, rows // 29 * 29 + 31))


def padded(batch: int, q_len: int, k_len: int) -> Interval:
    lengths = torch.tensor([k_len, k_len // 3])[:batch, None]
    return stacked((0 * lengths.expand(batch, q_len), lengths.expand(batch, q_len)))


def first_and_window(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    begin = (rows - 11).clamp(min=0)
    return stacked((0 * rows, begin.clamp(max=4)), (begin.clamp(min=4), rows + 1))


def scattered(batch: int, q_len: int, k_len: int, n: int = 1) -> Interval:
    """n disjoint random intervals per row and sample; about a quarter of the rows see nothing."""
    cuts = torch.randint(-3, k_len + 4, (batch, q_len, 2 * n)).sort(dim=-1).values
    cuts = torch.where(torch.rand(batch, q_len, 1) < 0.25, cuts[..., :1], cuts)
    return stacked(*((cuts[..., 2 * i], cuts[..., 2 * i + 1]) for i in range(n)))


def scattered_pairs(batch: int, q_len: int, k_len: int) -> Interval:
    return scattered(batch, q_len, k_len, n=2)


# Masks for what a kernel finds out about many rows at once: see test_ops_rows.py.


def one_row_differs(batch: int, q_len: int, k_len: int) -> Interval:
    """One row of each sample sees other keys than the others: another bit of its number each."""
    begin, end = torch.zeros(batch, q_len), torch.full((batch, q_len), k_len)
    for sample in range(batch):
        row = min(2 ** (sample // 2) + sample % 2, q_len - 1)
        begin[sample, row], end[sample, row] = (9, 30) if sample % 2 else (k_len - 40, k_len - 11)
    return stacked((begin, end))


def one_row_sees(batch: int, q_len: int, k_len: int) -> Interval:
    """The same row is the only one to see any keys."""
    begin, end = one_row_differs(batch, q_len, k_len)
    return begin, torch.where((begin == 0) & (end == k_len), 0, end)


def shifted(batch: int, q_len: int, k_len: int) -> Interval:
    """A stretch that begins and ends at another place of a tile of keys in each sample."""
    begin = (5 + 12 * torch.arange(batch)[:, None]).expand(batch, q_len)
    return stacked((begin, begin + 75))


def far_apart(batch: int, q_len: int, k_len: int) -> Interval:
    """One row in 2048 sees keys, in another bit of the number of its 64 rows each time."""
    rows = torch.arange(q_len)[None]
    begin = rows // 2048 * 3
    sees = rows % 2048 == 64 * 2 ** (rows // 2048)
    return stacked((begin, torch.where(sees, begin + 3, 0)))


def late(batch: int, q_len: int, k_len: int, first: int = 75) -> Interval:
    """No row sees the first keys."""
    rows = torch.arange(q_len)[None]
    return stacked((4 * rows + first, 4 * rows + first + 445))


def descending(batch: int, q_len: int, k_len: int) -> Interval:
    """The later a row, the earlier its keys begin: of a tile the last panels see the first key."""
    begin = k_len - 1 - torch.arange(q_len) * k_len // q_len
    return stacked((begin.expand(batch, -1), torch.full((batch, q_len), k_len)))


def turns(batch: int, q_len: int, k_len: int) -> Interval:
    """Some rows see all keys by their first interval, the others a few by their second."""
    rows = torch.arange(q_len)[None]
    first = rows < q_len // 2
    return stacked(
        (0 * rows, torch.where(first, k_len, 0)), (rows // 2, torch.where(first, 0, rows - 5))
    )


def moving_gap(batch: int, q_len: int, k_len: int) -> Interval:
    """Two stretches; before, between and after them are keys that no row sees."""
    rows = torch.arange(q_len)[None]
    return stacked((3 + rows // 2, 20 + rows // 2), (70 + rows, 90 + rows))


def rising_gap(batch: int, q_len: int, k_len: int) -> Interval:
    """A short stretch, which jumps from one row to the next."""
    late = torch.arange(q_len)[None] >= q_len // 3
    return stacked((torch.where(late, 67, 0), torch.where(late, 70, 3)))


def falling_gap(batch: int, q_len: int, k_len: int) -> Interval:
    begin, end = rising_gap(batch, q_len, k_len)
    return begin.flip(-1), end.flip(-1)


def jumps(batch: int, q_len: int, k_len: int) -> Interval:
    """A short stretch, but an earlier one for 24 rows: those before row 32, 64, ... by sample."""
    rows = torch.arange(q_len)[None]
    early = (rows // 32 == torch.arange(batch)[:, None]) & (rows % 32 >= 8)
    return stacked((torch.where(early, 0, 67), torch.where(early, 3, 70)))


def comb(batch: int, q_len: int, k_len: int) -> Interval:
    """Two keys of every eight, by one row each."""
    rows = torch.arange(q_len)[None]
    return stacked((8 * rows + 1, 8 * rows + 3))


GAPS = [moving_gap, rising_gap, falling_gap, comb]
MASKS: list[Callable[[int, int, int], Interval]] = [
    full,
    causal,
    bottom_right,
    window,
    documents,
    padded,
    first_and_window,
    scattered,
    scattered_pairs,
]
each_mask = pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.__name__)
