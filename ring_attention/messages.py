# SPDX-License-Identifier: BSD-3-Clause
"""The messages of a ring call, from packing to completion, and the rows they carry.

Note [order of messages]. K/V of hop h are the event 2h, gradients of hop t the event 2t + 3: after
K/V of hop t + 1, which are needed sooner, and before those of t + 2. Every rank posts in the order
of events and waits for an event only after it has posted all its own up to that one: the first
message in that order that is under way is posted on both sides. So no ring of ranks can wait for
itself, and a backend that matches messages by order (NCCL) matches the right ones, whatever the
mask pruned and however long a message may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from . import ops, trace
from .buffers import BufferPool, Lease
from .events import Phase
from .ring import TRAVELLERS, Message, Pending, Transport
from .steps import Step, Transfer

# Striped shards of packed documents send thousands of short ranges: more than these go by index.
FEW_RANGES = 16


@dataclass(frozen=True, eq=False)
class Rows:
    """Tensors [B, heads, rows, ...] that travel as one message: K and V, or Q, or their results."""

    tensors: tuple[Tensor, ...]
    lease: Lease | None = None  # of the message buffer that they are views of, if they are

    @property
    def rows(self) -> int:
        return self.tensors[0].shape[2]

    def nbytes(self, rows: int) -> int:
        """Bytes of a message of so many rows."""
        return sum(self._shape(x, rows).numel() * x.itemsize for x in self.tensors)

    def in_buffer(self, pool: BufferPool, rows: int) -> Rows:
        """Unwritten rows like these. What is not a multiple of 16 bytes long comes last."""
        lease = pool.lease(self.nbytes(rows), self.tensors[0], torch.uint8)
        views, at = [], 0
        for x in self.tensors:
            shape = self._shape(x, rows)
            nbytes = shape.numel() * x.itemsize
            views.append(lease.flat[at : at + nbytes].view(x.dtype).view(shape))
            at += nbytes
        return Rows(tuple(views), lease)

    @staticmethod
    def _shape(x: Tensor, rows: int) -> torch.Size:
        return torch.Size((*x.shape[:2], rows, *x.shape[3:]))


@dataclass
class _Posted:
    """Messages that are due together, and what becomes free once they are complete."""

    step: int
    due: int
    messages: list[Message]
    pending: Pending
    start_s: float
    done: list[Lease] = field(default_factory=list)


class Messages:
    """What one rank has under way in a call: add messages, post them, wait for those due."""

    def __init__(self, transport: Transport, phase: Phase) -> None:
        self._transport = transport
        self._phase = phase
        self._added: list[tuple[int, int, Message, list[Lease]]] = []  # event, due; leases to free
        self._posted: list[_Posted] = []
        self._start_s = 0.0

    def _add(
        self,
        lease: Lease,
        transfer: Transfer,
        kind: str,
        sending: bool,
        done: list[Lease],
        pack: Callable[[], None] | None = None,
    ) -> None:
        if not self._added:
            self._start_s = trace.now()
        event = 2 * transfer.hop + (0 if kind in TRAVELLERS else 3)
        message = Message(lease.flat, transfer.peer, kind, transfer.hop, sending, pack)
        self._added.append((event, transfer.due, message, done))

    def send(self, rows: Rows, transfer: Transfer, kind: str, *, last: bool = False) -> None:
        """Sends some of the rows; what is already packed as it is goes without a copy.

        Args:
            last: nobody needs the rows any more: their buffer is free once this is complete.
        """
        lease, pack = rows.lease, None
        done = [lease] if last and lease is not None else []
        if lease is None or transfer.num_rows != rows.rows:
            packed = rows.in_buffer(self._transport.pool, transfer.num_rows)
            lease, pack = packed.lease, partial(_pack, rows, transfer, packed)
            assert lease is not None
            done.append(lease)
        self._add(lease, transfer, kind, sending=True, done=done, pack=pack)

    def receive(self, like: Rows, transfer: Transfer, kind: str) -> Rows:
        """Receives rows into a buffer of their own; they are there once `transfer` is due."""
        rows = like.in_buffer(self._transport.pool, transfer.num_rows)
        assert rows.lease is not None
        self._add(rows.lease, transfer, kind, sending=False, done=[])
        return rows

    def post(self, step: int, following: int) -> None:
        """Packs and posts what was added since the last time.

        Args:
            step: the number of the step whose folds hide the messages.
            following: the number of the next one: what is due before it is waited for together.
        """
        if not self._added:
            return

        def due(added: tuple[int, int, Message, list[Lease]]) -> int:
            return max(added[1], following - 1)

        posting = trace.begin("post", self._phase, self._transport, step, self._start_s)
        # Messages of one event that are due at different times go to different peers.
        self._added.sort(key=lambda added: (added[0], due(added)))
        posted = []
        for when, group in groupby(self._added, key=due):
            entries = list(group)
            messages = [message for _, _, message, _ in entries]
            done = [lease for *_, leases in entries for lease in leases]
            pending = self._transport.post(messages)
            posted.append(_Posted(step, when, messages, pending, self._start_s, done))
        self._added.clear()
        self._posted += posted
        posting.end(message for p in posted for message in p.messages)

    def wait(self, step: int, following: int) -> None:
        """Returns when everything that is due before the step `following` is complete."""
        due = [posted for posted in self._posted if posted.due < following]
        if not due:
            return
        self._posted = [posted for posted in self._posted if posted.due >= following]
        waiting = trace.begin("wait", self._phase, self._transport, step)
        for posted in due:
            posted.pending.wait()
        waiting.end(message for posted in due for message in posted.messages)
        for p in due:
            trace.emit("transfer", self._phase, self._transport, p.step, p.start_s, p.messages)
            for lease in p.done:
                self._transport.pool.give_back(lease)


def _pack(rows: Rows, transfer: Transfer, packed: Rows) -> None:
    for x, into in zip(rows.tensors, packed.tensors, strict=True):
        if transfer.num_ranges > FEW_RANGES:
            torch.index_select(x, 2, transfer.index(x.device), out=into)
            continue
        at = 0
        for begin, end in transfer.rows:
            into[:, :, at : at + end - begin].copy_(x[:, :, begin:end])
            at += end - begin


class Blocks:
    """The blocks a rank holds, by origin: its own, and what travels."""

    def __init__(self, transport: Transport, kind: str, own: Rows) -> None:
        self._transport = transport
        self._kind = kind
        self.own = own
        self._held = {transport.rank: own}

    def __getitem__(self, origin: int) -> Rows:
        return self._held[origin]

    def exchange(self, messages: Messages, step: Step) -> None:
        """Adds the messages of a step that carry blocks."""
        for transfer in step.sends:
            messages.send(self[transfer.origin], transfer, self._kind)
        for transfer in step.recvs:
            self._held[transfer.origin] = messages.receive(self.own, transfer, self._kind)

    def release(self, origins: Iterable[int]) -> None:
        for origin in origins:
            rows = self._held.pop(origin)
            if rows.lease is not None:
                self._transport.pool.give_back(rows.lease)


class Sums:
    """The gradients that a rank sums: of its own rows, and contributions on their way home."""

    def __init__(self, transport: Transport, kind: str, own: Rows) -> None:
        self._transport = transport
        self._kind = kind
        self.own = own
        self._out: dict[int, Rows] = {}
        self._in: list[tuple[Transfer, Rows]] = []

    def of(self, origin: int, rows: int) -> Rows:
        """Where results for `origin`'s rows are summed; never a buffer that is travelling.

        Args:
            rows: of the block as held.
        """
        if origin == self._transport.rank:
            return self.own
        if origin not in self._out:
            made = self.own.in_buffer(self._transport.pool, rows)
            assert made.lease is not None
            made.lease.flat.zero_()
            self._out[origin] = made
        return self._out[origin]

    def exchange(self, messages: Messages, step: Step) -> None:
        """Adds the messages with what is complete after a step, and with what arrives."""
        for transfer in step.grad_sends:
            messages.send(self._out.pop(transfer.origin), transfer, self._kind, last=True)
        for transfer in step.grad_recvs:
            self._in.append((transfer, messages.receive(self.own, transfer, self._kind)))

    def add_arrived(self, following: int, held_rows: dict[int, int]) -> None:
        """Adds what was due before the step `following`, in the order it was posted, always."""
        for transfer, rows in self._arrived(following):
            self._add(self.of(transfer.origin, held_rows[transfer.origin]), transfer, rows)
            assert rows.lease is not None
            self._transport.pool.give_back(rows.lease)

    def _arrived(self, following: int) -> list[tuple[Transfer, Rows]]:
        arrived = [entry for entry in self._in if entry[0].due < following]
        self._in = [entry for entry in self._in if entry[0].due >= following]
        return arrived

    def _add(self, into: Rows, transfer: Transfer, rows: Rows) -> None:
        for total, x in zip(into.tensors, rows.tensors, strict=True):
            if transfer.num_ranges > FEW_RANGES:
                total.index_add_(2, transfer.index(x.device), x)
                continue
            at = 0
            for begin, end in transfer.rows:
                total[:, :, begin:end] += x[:, :, at : at + end - begin]
                at += end - begin


class States(Sums):
    """Running states (acc, m, l) of queries; all zero where no key was seen."""

    def _add(self, into: Rows, transfer: Transfer, rows: Rows) -> None:
        if transfer.num_rows == into.rows:
            _combine(into.tensors, rows.tensors)
            return
        index = transfer.index(into.tensors[0].device)
        some = [x.index_select(2, index) for x in into.tensors]
        _combine(some, rows.tensors)
        for x, joined in zip(into.tensors, some, strict=True):
            x.index_copy_(2, index, joined)


def _combine(state: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    (acc, m, l), (other_acc, other_m, other_l) = state, other  # noqa: E741
    ops.combine_(acc, m, l, other_acc, other_m, other_l)
