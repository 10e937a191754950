# SPDX-License-Identifier: BSD-3-Clause
"""Masks: which global key positions each global query position sees.

Positions are those of the whole sequence, never of a shard. Combine masks with ``&`` and ``|``:

    Causal() & Documents(cu_seqlens)                  packed documents
    Causal() & KeyLength([7, 9])                      a padded batch of two
    Causal() | Spans([(4, 20)])                       an image that sees itself
    Causal() & (FirstTokens(4) | Window(1023, 0))     attention sinks and a window of 1024
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._planner import Segments
from .mask_algebra import And, Mask, Or, PerSample, Sample, at_least, of_sample, per_sample, refuse
from .mask_ranges import Chunks, Documents, Spans

__all__ = [
    "MASKS",
    "And",
    "Causal",
    "Chunks",
    "Documents",
    "FirstTokens",
    "Full",
    "KeyLength",
    "Mask",
    "Or",
    "PrefixLM",
    "Spans",
    "Window",
]


def _shift(bottom_right: bool, sample: Sample) -> int:
    """How far the diagonal lies to the right of position p: the last query meets the last key."""
    return sample.key_len - sample.q_len if bottom_right else 0


def _rows(sample: Sample, lo: tuple[int, int], hi: tuple[int, int]) -> Segments:
    """One segment for all rows; lo and hi as (value at position 0, slope)."""
    return Segments(sample.q_len, sample.k_len, [(0, sample.q_len, *lo, *hi)])


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def _table(self, sample: Sample) -> Segments:
        return _rows(sample, (0, 0), (sample.k_len, 0))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        return (q >= 0) & (k >= 0)


@dataclass(frozen=True)
class Causal(Mask):
    """Query p sees the keys 0 .. p.

    Args:
        bottom_right: align the last query with the last key of the sample (with KeyLength: its own
            last key) instead of the first with the first; for queries that follow a cache.

    Example:
        >>> Causal(bottom_right=True).dense(2, 4)[0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """

    bottom_right: bool = False

    def _table(self, sample: Sample) -> Segments:
        return _rows(sample, (0, 0), (_shift(self.bottom_right, sample) + 1, 1))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        return k <= q + _shift(self.bottom_right, sample)


@dataclass(frozen=True)
class Window(Mask):
    """Query p sees the keys p - left .. p + right.

    Args:
        left, right: keys before and after the query, itself excluded; None is unbounded. Hugging
            Face's ``sliding_window = w`` is ``Window(w - 1, 0)``.
        bottom_right: align the last query with the last key of the sample, as in Causal.

    Example:
        >>> Window(1, 0).dense(3, 3)[0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    left: int | None = None
    right: int | None = 0
    bottom_right: bool = False

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None:
                at_least("Window", name, value, 0, "it counts keys; None is unbounded")

    def _table(self, sample: Sample) -> Segments:
        shift = _shift(self.bottom_right, sample)
        lo = (0, 0) if self.left is None else (shift - self.left, 1)
        hi = (sample.k_len, 0) if self.right is None else (shift + self.right + 1, 1)
        return _rows(sample, lo, hi)

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        ahead = k - (q + _shift(self.bottom_right, sample))
        sees = torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            sees &= ahead >= -self.left
        if self.right is not None:
            sees &= ahead <= self.right
        return sees


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, but the first ``prefix`` positions see each other both ways.

    Args:
        prefix: one length, or one per sample.
    """

    prefix: PerSample

    def __post_init__(self) -> None:
        per_sample(self, "prefix")

    @property
    def batch(self) -> int:
        return len(self.prefix)

    def _table(self, sample: Sample) -> Segments:
        prefix = of_sample(self.prefix, sample)
        rows = [(0, prefix, 0, 0, prefix, 0), (prefix, sample.q_len, 0, 0, 1, 1)]
        return Segments(sample.q_len, sample.k_len, rows)

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        prefix = of_sample(self.prefix, sample)
        return (k <= q) | ((q < prefix) & (k < prefix))


@dataclass(frozen=True)
class FirstTokens(Mask):
    """Every query sees the first ``count`` keys: attention sinks that are tokens."""

    count: int

    def __post_init__(self) -> None:
        at_least("FirstTokens", "count", self.count, 0, "it counts keys")

    def _table(self, sample: Sample) -> Segments:
        return _rows(sample, (0, 0), (self.count, 0))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        return (k < self.count) & (q >= 0)


@dataclass(frozen=True)
class KeyLength(Mask):
    """Only the first keys exist: padding at the end, per sample.

    Args:
        lengths: one length, or one per sample. Bottom-right masks in the same ``&`` align with it.

    Example:
        >>> (Causal() & KeyLength([1, 2])).dense(2, 2).int().tolist()
        [[[1, 0], [1, 0]], [[1, 0], [1, 1]]]
    """

    lengths: PerSample

    def __post_init__(self) -> None:
        per_sample(self, "lengths")

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def _key_length(self, index: int) -> int:
        length: int = self.lengths[index if self.batch > 1 else 0]
        return length

    def _table(self, sample: Sample) -> Segments:
        n = of_sample(self.lengths, sample)
        if n > sample.k_len:
            refuse("KeyLength", f"lengths <= {sample.k_len}", n, "they count keys that exist")
        return _rows(sample, (0, 0), (n, 0))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        return (k < of_sample(self.lengths, sample)) & (q >= 0)


# Every mask, with arguments that fit any length: tests run over this list.
MASKS: tuple[Mask, ...] = (
    Full(),
    Causal(),
    Causal(bottom_right=True),
    Window(3, 2),
    Window(None, 2),
    Window(2, None, bottom_right=True),
    PrefixLM([2, 5]),
    Causal() & KeyLength([1, 0]),
    Causal() & Chunks(3),
    Causal() | Spans([(1, 4)]),
    Causal() & (FirstTokens(2) | Window(2, 0)),
)
