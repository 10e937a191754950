# SPDX-License-Identifier: BSD-3-Clause
"""Masks that are lists of ranges: packed documents, bidirectional spans, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._planner import Segments
from .mask_algebra import Mask, Sample, at_least, integers, of_sample, refuse

Bounds = tuple[tuple[int, ...], ...]  # per sample (or one for all): 0 = b0 <= b1 <= ... = length


def _bounds(argument: str, value: Any) -> Bounds:
    listed = value.tolist() if isinstance(value, Tensor) else value
    nested = isinstance(listed, Sequence) and listed and not isinstance(listed[0], int)
    bounds = tuple(integers("Documents", argument, row) for row in (listed if nested else [listed]))
    for row in bounds:
        if len(row) < 1 or row[0] != 0 or any(a > b for a, b in pairwise(row)):
            refuse(
                "Documents",
                f"{argument} that starts at 0 and ascends",
                repr(row)[:80],
                "pass cumulative lengths [0, n0, n0 + n1, ...], or use Documents.from_ids",
            )
    return bounds


def _rows(name: str, values: Any) -> Tensor:
    """[S] or [B, S] integers as an int64 CPU tensor [B, S]."""
    rows = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    if rows.dim() not in (1, 2) or rows.is_floating_point() or rows.is_complex():
        shape = f"{rows.dtype} of shape {tuple(rows.shape)}"
        refuse(name, "integers [S] or [B, S]", shape, "pass one integer per position")
    return torch.atleast_2d(rows.to("cpu", torch.int64))


def _starts(first: Tensor) -> tuple[int, ...]:
    """Bounds of the runs that begin where ``first`` (bool [S], first[0] unused) is true."""
    return (0, *(torch.nonzero(first[1:])[:, 0] + 1).tolist(), len(first))


def _brief(rows: tuple[tuple[Any, ...], ...]) -> str:
    """A list per sample; long ones by their ends."""
    texts = [
        str(list(row)) if len(row) <= 8 else f"[{row[0]}, {row[1]}, ... {row[-1]}]" for row in rows
    ]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Packed documents: every position sees its own document, and nothing else.

    Args:
        cu_seqlens: cumulative lengths [0, n0, n0 + n1, ...] up to the whole length, as a list or
            tensor; or a list of them, one per sample.
        k_cu_seqlens: the same for the keys of cross attention: queries of document i see the keys
            of document i. None: the same documents.
        padding: per entry of cu_seqlens, the numbers of the documents that see nothing.

    Example:
        >>> (Causal() & Documents([0, 2, 3])).dense(3, 3)[0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """

    cu_seqlens: Any
    k_cu_seqlens: Any = None
    padding: Any = ()

    def __post_init__(self) -> None:
        q = _bounds("cu_seqlens", self.cu_seqlens)
        k = q if self.k_cu_seqlens is None else _bounds("k_cu_seqlens", self.k_cu_seqlens)
        if [len(row) for row in q] != [len(row) for row in k]:
            refuse(
                "Documents",
                "as many documents in k_cu_seqlens as in cu_seqlens, sample by sample",
                f"{[len(row) - 1 for row in k]} and {[len(row) - 1 for row in q]}",
                "give documents without keys (or queries) length 0",
            )
        hidden = tuple(tuple(sorted(row)) for row in self.padding) or ((),) * len(q)
        if len(hidden) != len(q):
            refuse("Documents", "padding per sample", f"{len(hidden)} entries", f"pass {len(q)}")
        object.__setattr__(self, "cu_seqlens", q)
        object.__setattr__(self, "k_cu_seqlens", None if k == q else k)
        object.__setattr__(self, "padding", hidden if any(hidden) else ())

    @staticmethod
    def from_ids(ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Documents:
        """Documents from one id per position, [S] or [B, S]; ids < 0 are padding.

        Raises:
            ValueError: an id comes back after another document: a row would see several intervals.

        Example:
            >>> Documents.from_ids([7, 7, 3, -1]).cu_seqlens
            ((0, 2, 3, 4),)
        """
        bounds, padding = [], []
        for row in _rows("Documents.from_ids", ids).clamp(min=-1):
            starts = _starts(torch.cat([row[:1], row[1:] - row[:-1]]) != 0)
            firsts = row[list(starts[:-1])].tolist() if len(row) else []
            real = [i for i in firsts if i >= 0]
            if len(set(real)) < len(real):
                twice = next(i for n, i in enumerate(real) if i in real[:n])
                refuse(
                    "Documents.from_ids",
                    "each document's positions next to each other",
                    f"id {twice} in two places",
                    "sort the sequence by document, or give the parts different ids",
                )
            bounds.append(starts if len(row) else (0,))
            padding.append(tuple(n for n, i in enumerate(firsts) if i < 0))
        return Documents(tuple(bounds), padding=tuple(padding))

    @staticmethod
    def from_positions(position_ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Documents:
        """Documents from the positions inside each document, [S] or [B, S], for the whole sequence.

        Raises:
            ValueError: a document does not start at 0, as when these are positions of one shard.

        Example:
            >>> Documents.from_positions([0, 1, 2, 0, 1]).cu_seqlens
            ((0, 3, 5),)
        """
        bounds = []
        for row in _rows("Documents.from_positions", position_ids):
            starts = _starts(torch.cat([row[:1], row[1:] - row[:-1]]) != 1)
            wrong = [s for s in starts[:-1] if len(row) and row[s] != 0]
            if wrong:
                refuse(
                    "Documents.from_positions",
                    "documents that count 0, 1, 2, ...",
                    f"position id {int(row[wrong[0]])} at {wrong[0]}, where a document starts",
                    "pass the ids of the whole sequence, before sharding",
                )
            bounds.append(starts if len(row) else (0,))
        return Documents(tuple(bounds))

    @property
    def batch(self) -> int:
        return len(self.cu_seqlens)

    def _parts(self, sample: Sample) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        q = of_sample(self.cu_seqlens, sample)
        k = of_sample(self.k_cu_seqlens or self.cu_seqlens, sample)
        for which, length, row in (("q", sample.q_len, q), ("k", sample.k_len, k)):
            if row[-1] != length:
                refuse(
                    "Documents",
                    f"documents that end at {which}_len = {length}",
                    row[-1],
                    f"add the rest as a document, or use k_cu_seqlens if {which} is different",
                )
        return q, k, of_sample(self.padding or ((),), sample)

    def _table(self, sample: Sample) -> Segments:
        return Segments.blocks(sample.q_len, sample.k_len, *self._parts(sample))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        q_bounds, k_bounds, padding = self._parts(sample)
        q_document = torch.bucketize(q, torch.tensor(q_bounds, device=q.device), right=True) - 1
        k_document = torch.bucketize(k, torch.tensor(k_bounds, device=k.device), right=True) - 1
        hidden = torch.isin(q_document, torch.tensor(padding, dtype=torch.int64, device=q.device))
        return (q_document == k_document) & ~hidden

    def __repr__(self) -> str:
        keys = "" if self.k_cu_seqlens is None else f", {_brief(self.k_cu_seqlens)}"
        padding = f", padding={_brief(self.padding)}" if self.padding else ""
        return f"Documents({_brief(self.cu_seqlens)}{keys}{padding})"


@dataclass(frozen=True)
class Spans(Mask):
    """Positions of one span see each other both ways, other rows see nothing: ``Causal() | Spans``.

    Args:
        ranges: disjoint (begin, end) ranges of positions; or a list of such lists, one per sample.

    Example:
        >>> (Causal() | Spans([(0, 2)])).dense(3, 3)[0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    ranges: Any

    def __post_init__(self) -> None:
        listed = self.ranges.tolist() if isinstance(self.ranges, Tensor) else list(self.ranges)
        nested = bool(listed) and not (listed[0] and isinstance(listed[0][0], int))
        samples = []
        for row in listed if nested else [listed]:
            spans = sorted(integers("Spans", "ranges", span) for span in row)
            flat = [bound for span in spans for bound in span]
            if any(len(span) != 2 for span in spans) or flat != sorted(flat):
                refuse("Spans", "disjoint (begin, end) ranges", spans, "merge spans that overlap")
            samples.append(tuple(spans))
        object.__setattr__(self, "ranges", tuple(samples))

    @property
    def batch(self) -> int:
        return len(self.ranges)

    def _table(self, sample: Sample) -> Segments:
        rows = [(a, b, a, 0, b, 0) for a, b in of_sample(self.ranges, sample)]
        return Segments(sample.q_len, sample.k_len, rows)

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        sees = (q < 0) & (k < 0)
        for a, b in of_sample(self.ranges, sample):
            sees = sees | ((a <= q) & (q < b) & (a <= k) & (k < b))
        return sees


@dataclass(frozen=True)
class Chunks(Mask):
    """Position p sees its own chunk of ``size`` positions; with Causal: chunked attention."""

    size: int

    def __post_init__(self) -> None:
        at_least("Chunks", "size", self.size, 1, "it counts positions")

    def _table(self, sample: Sample) -> Segments:
        starts = list(range(0, sample.q_len, self.size))
        keys = [*starts, len(starts) * self.size]
        return Segments.blocks(sample.q_len, sample.k_len, [*starts, sample.q_len], keys)

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        return q // self.size == k // self.size
