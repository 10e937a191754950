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
