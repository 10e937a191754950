# SPDX-License-Identifier: BSD-3-Clause
"""Steps and transfers: the words in which a plan says what a rank does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import _planner
from .device_copy import DeviceCopy


@dataclass(frozen=True)
class Transfer:
    """One message of K/V rows (or of their gradients).

    Attributes:
        peer: the rank in the group that it goes to or comes from.
        origin: the rank that owns the rows.
        hop: its place in the order in which all ranks post: K/V of hop t, then gradients of
            hop t - 1, then K/V of hop t + 1.
        due: the hop after which it is complete: its own (the next one, of gradients), or a later
            one if a slow link has several folds to hide behind.
        ranges: which rows, as the planner keeps them; see Step for what they count from.
    """

    peer: int
    origin: int
    hop: int
    due: int
    ranges: _planner.Ranges = field(repr=False, compare=False)
    _index: dict[torch.device, DeviceCopy] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """The rows as ascending (begin, end) ranges; never empty."""
        return self.ranges.tuples()

    def index(self, device: torch.device | None = None) -> Tensor:
        """The rows one by one, int64 [num_rows]: quicker than thousands of ranges.

        On the CPU, or kept for the next call on another device.
        """
        on_cpu = device is None or device.type == "cpu"
        if not on_cpu and device in self._index:
            return self._index[device].get()
        index = torch.empty(self.num_rows, dtype=torch.int64, device="cpu")
        self.ranges.fill(index.data_ptr())
        if on_cpu:
            return index
        assert device is not None
        return self._index.setdefault(device, DeviceCopy(index, device)).get()

    @property
    def num_rows(self) -> int:
        """How many rows travel."""
        return self.ranges.rows

    @property
    def num_ranges(self) -> int:
        """How many stretches they form: ``len(rows)``, without making them."""
        return len(self.ranges)

    def __repr__(self) -> str:
        return f"Transfer(peer={self.peer}, origin={self.origin}, {self.num_rows} rows)"


@dataclass(frozen=True)
class Step:
    """What a rank does between two waits.

    Attributes:
        number: the hop at which it folds; ascending, with gaps where nothing is to be done.
        folds: origins whose blocks are folded; the own block is in the first step, if at all.
        sends: K/V posted before the folds; rows count from the block as this rank holds it.
        recvs: K/V posted before the folds, used in steps after the hop at which they are due; rows
            count from the origin's shard, and the block as held is those rows, concatenated.
        grad_sends: in backward, what has been summed of the dK/dV of blocks up to this step, posted
            after it: to their owner, or to a rank that sums first; only rows touched, counted from
            the block as held.
        grad_recvs: contributions to the dK/dV of the own shard, or of a block whose gradients this
            rank sums, posted at the same place; rows count from that block as held.
        release: received blocks that are dead after this step (never the own one).
        flops: visible query-key pairs of the folds, per head: 4 head_dim flops each in forward.
    """

    number: int
    folds: tuple[int, ...]
    sends: tuple[Transfer, ...]
    recvs: tuple[Transfer, ...]
    grad_sends: tuple[Transfer, ...]
    grad_recvs: tuple[Transfer, ...]
    release: tuple[int, ...]
    flops: int

    @property
    def rows(self) -> int:
        """K/V rows sent in this step."""
        return sum(t.num_rows for t in self.sends)

    @property
    def grad_rows(self) -> int:
        """dK/dV rows sent in this step of backward."""
        return sum(t.num_rows for t in self.grad_sends)


def step_of(step: _planner.Step) -> Step:
    def transfers(listed: list[_planner.Transfer]) -> tuple[Transfer, ...]:
        return tuple(Transfer(t.peer, t.origin, t.hop, t.due, t.ranges) for t in listed)

    return Step(
        number=step.number,
        folds=tuple(step.folds),
        sends=transfers(step.sends),
        recvs=transfers(step.recvs),
        grad_sends=transfers(step.grad_sends),
        grad_recvs=transfers(step.grad_recvs),
        release=tuple(step.release),
        flops=step.flops,
    )


def last_due(steps: Sequence[Step]) -> int:
    """The hop after which nothing of these steps is under way any more."""
    transfers = [t for s in steps for t in (*s.sends, *s.recvs, *s.grad_sends, *s.grad_recvs)]
    return max([steps[-1].number, *(t.due for t in transfers)])
