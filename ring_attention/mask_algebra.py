# SPDX-License-Identifier: BSD-3-Clause
"""What a mask is, and how masks combine. The masks themselves are in mask.py.

Note [masks]. A mask is a small value: frozen, hashable, serialisable, without any tensor of the
sequence's length. It compiles to a table of segments per sample (csrc/plan/segments.h): stretches
of query positions whose visible keys are intervals with bounds of slope 0 or 1. Masks intersect
with ``&`` and unite with ``|``; a row may end up with at most ``MAX_INTERVALS`` intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from ._planner import MAX_INTERVALS, Segments

# What callers pass (int | Sequence[int] | Tensor) is a tuple of 1 or B ints once constructed.
PerSample = Any


class Sample(NamedTuple):
    """One sample of a batch, as a mask sees it."""

    number: int
    q_len: int
    k_len: int
    key_len: int  # keys of this sample that exist: k_len, or less under KeyLength


def refuse(name: str, expected: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"ring_attention.{name}: expected {expected}, got {got}; {remedy}")


def at_least(name: str, argument: str, value: object, least: int, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        refuse(name, f"an integer {argument} >= {least}", repr(value), remedy)


def integers(name: str, argument: str, values: object) -> tuple[int, ...]:
    """One integer, many, or an integer tensor, as a tuple of Python ints >= 0."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    listed = [listed] if isinstance(listed, int) else listed
    if not isinstance(listed, Sequence):
        refuse(name, f"integers as {argument}", repr(values)[:80], "pass a list or a 1-D tensor")
    for value in listed:
        at_least(name, argument, value, 0, "it counts positions")
    return tuple(listed)


def per_sample(mask: Mask, argument: str) -> None:
    """Normalises a field that is one integer or one per sample to a tuple of 1 or B."""
    name = type(mask).__name__
    values = integers(name, argument, getattr(mask, argument))
    if not values:
        refuse(name, f"at least one integer as {argument}", "none", "pass one, or one per sample")
    object.__setattr__(mask, argument, values)


T = TypeVar("T")


def of_sample(values: Sequence[T], sample: Sample) -> T:
    """The sample's own entry, or the one that all samples share."""
    return values[sample.number if len(values) > 1 else 0]


class Mask:
    """Base of all masks. ``a & b`` keeps what both let through, ``a | b`` what either does.

    Example:
        >>> mask = Causal() & Documents([0, 3, 5])
        >>> mask.dense(5, 5)[0, 4].int().tolist()
        [0, 0, 0, 1, 1]
    """

    kinds: ClassVar[dict[str, type[Mask]]] = {}  # every kind of mask by name, for from_dict

    def __init_subclass__(cls) -> None:
        Mask.kinds[cls.__name__] = cls

    @property
    def batch(self) -> int:
        """How many samples the mask tells apart: 1 (shared by any batch) or the batch size."""
        return 1

    def _table(self, sample: Sample) -> Segments:
        raise NotImplementedError

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        """The mask's definition: q [q_len, 1] and k [1, k_len] are positions."""
        raise NotImplementedError

    def _key_length(self, index: int) -> int | None:
        return None

    def _sample(self, index: int, q_len: int, k_len: int) -> Sample:
        at_least(type(self).__name__, "q_len", q_len, 0, "lengths count tokens")
        at_least(type(self).__name__, "k_len", k_len, 0, "lengths count tokens")
        return Sample(index, q_len, k_len, k_len)

    def segments(self, q_len: int, k_len: int) -> list[Segments]:
        """The compiled tables: one per sample, or a single one if all samples are alike.

        Raises:
            ValueError: the mask does not fit the lengths, or a row needs too many intervals.
        """
        tables = [self._table(self._sample(i, q_len, k_len)) for i in range(self.batch)]
        for index, table in enumerate(tables):
            most, row = table.intervals()
            if most > MAX_INTERVALS:
                refuse(
                    "mask",
                    f"at most {MAX_INTERVALS} key intervals per query row",
                    f"{most} for query position {row} of sample {index} under {self!r}",
                    "unite fewer masks, or masks that touch",
                )
        return tables[:1] if all(table == tables[0] for table in tables) else tables

    def intervals(self, q_len: int, k_len: int) -> tuple[Tensor, Tensor]:
        """The keys that each query position sees, as half-open intervals of positions.

        Returns:
            lo, hi: int64 [n, B or 1, q_len]; a row's intervals are disjoint, ``lo == hi`` is empty.
        """
        tables = self.segments(q_len, k_len)
        most = max(1, *(table.intervals()[0] for table in tables))
        lo, hi = torch.zeros(2, most, len(tables), q_len, dtype=torch.int64, device="cpu")
        for b, table in enumerate(tables):
            table.fill(lo[:, b].data_ptr(), hi[:, b].data_ptr(), lo.stride(0))
        return lo, hi

    def dense(self, q_len: int, k_len: int) -> Tensor:
        """The mask as a boolean [B or 1, q_len, k_len], straight from its definition: for tests."""
        q = torch.arange(q_len, device="cpu")[:, None]
        k = torch.arange(k_len, device="cpu")[None]
        rows = []
        for i in range(self.batch):
            sample = self._sample(i, q_len, k_len)
            rows.append(self._sees(q, k, sample).expand(q_len, k_len))
        return torch.stack(rows)

    def __and__(self, other: Mask) -> Mask:
        return And((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or((self, other)) if isinstance(other, Mask) else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form; ``Mask.from_dict`` is its inverse."""

        def plain(value: Any) -> Any:
            if isinstance(value, Mask):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"mask": type(self).__name__} | {
            f.name: plain(getattr(self, f.name)) for f in fields
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Mask:
        """The mask that ``to_dict`` described."""

        def value(v: Any) -> Any:
            if isinstance(v, dict):
                return Mask.from_dict(v)
            return tuple(value(x) for x in v) if isinstance(v, list) else v

        kind = Mask.kinds.get(data.get("mask", ""))
        if kind is None:
            refuse("Mask.from_dict", f"a mask of {sorted(Mask.kinds)}", data, "use Mask.to_dict")
        return kind(**{name: value(v) for name, v in data.items() if name != "mask"})


@dataclass(frozen=True)
class _Combination(Mask):
    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 1 or not all(isinstance(part, Mask) for part in self.parts):
            refuse(type(self).__name__, "masks", repr(self.parts), "combine masks with & and |")
        flat = [p.parts if type(p) is type(self) else (p,) for p in self.parts]
        object.__setattr__(self, "parts", sum(flat, ()))
        counts = {part.batch for part in self.parts} - {1}
        if len(counts) > 1:
            refuse(
                type(self).__name__,
                "masks of one batch size (or shared ones)",
                f"batch sizes {sorted(counts)}",
                "give every per-sample mask one entry per sample",
            )

    @property
    def batch(self) -> int:
        return max(part.batch for part in self.parts)


class And(_Combination):
    """What every part lets through; made by ``a & b``. Its KeyLength holds for all parts."""

    def _key_length(self, index: int) -> int | None:
        lengths = [part._key_length(index) for part in self.parts]
        return min((n for n in lengths if n is not None), default=None)

    def _narrow(self, sample: Sample) -> Sample:
        own = self._key_length(sample.number)
        return sample if own is None else sample._replace(key_len=min(own, sample.key_len))

    def _table(self, sample: Sample) -> Segments:
        sample = self._narrow(sample)
        return reduce(Segments.__and__, (part._table(sample) for part in self.parts))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        sample = self._narrow(sample)
        return reduce(torch.logical_and, (part._sees(q, k, sample) for part in self.parts))

    def __repr__(self) -> str:
        return " & ".join(f"({p!r})" if isinstance(p, Or) else repr(p) for p in self.parts)


class Or(_Combination):
    """What any part lets through; made by ``a | b``."""

    def _table(self, sample: Sample) -> Segments:
        return reduce(Segments.__or__, (part._table(sample) for part in self.parts))

    def _sees(self, q: Tensor, k: Tensor, sample: Sample) -> Tensor:
        return reduce(torch.logical_or, (part._sees(q, k, sample) for part in self.parts))

    def __repr__(self) -> str:
        return " | ".join(f"({p!r})" if isinstance(p, And) else repr(p) for p in self.parts)
