# SPDX-License-Identifier: BSD-3-Clause
"""The messages of a ring call, from packing to completion, and the blocks they carry.

Note [order of messages]. K/V of hop h are the event 2h, gradients of hop t the event 2t + 3: after
K/V of hop t + 1, which are needed sooner, and before those of t + 2. Every rank posts in the order
of events and waits for an event only after it has posted all its own up to that one: the first
message in that order that is under way is posted on both sides. So no ring of ranks can wait for
itself, and a backend that matches messages by order (NCCL) matches the right ones, whatever the
mask pruned and however long a message may take.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from . import trace
from .buffers import Lease
from .plan import Step, Transfer
from .ring import Message, Pending, Transport

Kind = Literal["K/V", "dK/dV"]

# Striped shards of packed documents send thousands of short ranges: more than these go by index.
FEW_RANGES = 16


def split(flat: Tensor, k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Views a message as its two halves, [B, G, rows, D] and [B, G, rows, Dv]."""
    batch, kv_heads, _, head_dim = k.shape
    numel = batch * kv_heads * rows * head_dim
    return (
        flat[:numel].view(batch, kv_heads, rows, head_dim),
        flat[numel:].view(batch, kv_heads, rows, v.shape[3]),
    )


@dataclass(frozen=True, eq=False)
class Pair:
    """K and V of a block, or their gradients; `lease` when both live in one message buffer."""

    k: Tensor  # [B, G, rows, D]
    v: Tensor  # [B, G, rows, Dv]
    lease: Lease | None = None

    @property
    def rows(self) -> int:
        return self.k.shape[2]

    def numel(self, rows: int) -> int:
        batch, kv_heads, _, head_dim = self.k.shape
        return batch * kv_heads * rows * (head_dim + self.v.shape[3])


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

    def __init__(self, transport: Transport, phase: trace.Phase) -> None:
        self._transport = transport
        self._phase = phase
        self._added: list[tuple[int, int, Message, list[Lease]]] = []  # event, due; leases to free
        self._posted: list[_Posted] = []
        self._start_s = 0.0

    def _add(
        self, flat: Tensor, transfer: Transfer, kind: Kind, sending: bool, done: Iterable[Lease]
    ) -> None:
        if not self._added:
            self._start_s = trace.now()
        event = 2 * transfer.hop + (0 if kind == "K/V" else 3)
        message = Message(flat, transfer.peer, kind, transfer.hop, sending)
        self._added.append((event, transfer.due, message, list(done)))

    def send(self, pair: Pair, transfer: Transfer, kind: Kind, *, last: bool = False) -> None:
        """Sends some rows of a pair; one that is already packed as it is goes without a copy.

        Args:
            last: nobody needs the pair any more: its buffer is free once this is complete.
        """
        start_s = trace.now()
        lease = pair.lease
        done = [lease] if last and lease is not None else []
        if lease is None or transfer.num_rows != pair.rows:
            lease = _pack(self._transport, pair, transfer)
            done.append(lease)
        if not self._added:
            self._start_s = start_s
        self._add(lease.flat, transfer, kind, sending=True, done=done)

    def receive(self, like: Pair, transfer: Transfer, kind: Kind) -> Pair:
        """Receives rows into a buffer of their own; they are there once `transfer` is due."""
        rows = transfer.num_rows
        lease = self._transport.pool.lease(like.numel(rows), like.k)
        self._add(lease.flat, transfer, kind, sending=False, done=())
        return Pair(*split(lease.flat, like.k, like.v, rows), lease)

    def post(self, step: int, following: int) -> None:
        """Posts what was added since the last time.

        Args:
            step: the number of the step whose folds hide the messages.
            following: the number of the next one: what is due before it is waited for together.
        """
        if not self._added:
            return

        def due(added: tuple[int, int, Message, list[Lease]]) -> int:
            return max(added[1], following - 1)

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
        self._emit("post", step, self._start_s, posted)

    def wait(self, step: int, following: int) -> None:
        """Returns when everything that is due before the step `following` is complete."""
        start_s = trace.now()
        due = [posted for posted in self._posted if posted.due < following]
        self._posted = [posted for posted in self._posted if posted.due >= following]
        for posted in due:
            posted.pending.wait()
            for lease in posted.done:
                self._transport.pool.give_back(lease)
        if due:
            self._emit("wait", step, start_s, due)
            for posted in due:
                self._emit("transfer", posted.step, posted.start_s, [posted])

    def _emit(self, name: trace.Name, step: int, start_s: float, posted: list[_Posted]) -> None:
        nbytes = sum(message.nbytes for p in posted for message in p.messages)
        trace.emit(name, self._phase, self._transport.traced_rank, step, start_s, nbytes)


def _pack(transport: Transport, pair: Pair, transfer: Transfer) -> Lease:
    count = transfer.num_rows
    lease = transport.pool.lease(pair.numel(count), pair.k)
    k, v = split(lease.flat, pair.k, pair.v, count)
    if transfer.num_ranges > FEW_RANGES:
        rows = transfer.index().to(pair.k.device)
        torch.index_select(pair.k, 2, rows, out=k)
        torch.index_select(pair.v, 2, rows, out=v)
        return lease
    at = 0
    for begin, end in transfer.rows:
        k[:, :, at : at + end - begin].copy_(pair.k[:, :, begin:end])
        v[:, :, at : at + end - begin].copy_(pair.v[:, :, begin:end])
        at += end - begin
    return lease


class Blocks:
    """The K/V blocks a rank holds, by origin: its own, and what travels."""

    def __init__(self, transport: Transport, own: Pair) -> None:
        self._transport = transport
        self._own = own
        self._held = {transport.rank: own}

    def __getitem__(self, origin: int) -> Pair:
        return self._held[origin]

    def exchange(self, messages: Messages, step: Step) -> None:
        """Adds the K/V messages of a step."""
        for transfer in step.sends:
            messages.send(self[transfer.origin], transfer, "K/V")
        for transfer in step.recvs:
            self._held[transfer.origin] = messages.receive(self._own, transfer, "K/V")

    def release(self, origins: Iterable[int]) -> None:
        for origin in origins:
            pair = self._held.pop(origin)
            if pair.lease is not None:
                self._transport.pool.give_back(pair.lease)


class Gradients:
    """The dK/dV that a rank sums: of its own shard, and contributions on their way home."""

    def __init__(self, transport: Transport, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self._transport = transport
        self.own = Pair(
            torch.zeros(k.shape, dtype=dtype, device=k.device),
            torch.zeros(v.shape, dtype=dtype, device=v.device),
        )
        self._out: dict[int, Pair] = {}
        self._in: list[tuple[Transfer, Pair]] = []

    def of(self, origin: int, rows: int) -> Pair:
        """Where the gradients of `origin`'s block are summed; never a buffer that is travelling.

        Args:
            rows: of the block as held.
        """
        if origin == self._transport.rank:
            return self.own
        pair = self._out.get(origin)
        if pair is None:
            lease = self._transport.pool.lease(self.own.numel(rows), self.own.k)
            lease.flat.zero_()
            pair = Pair(*split(lease.flat, self.own.k, self.own.v, rows), lease)
            self._out[origin] = pair
        return pair

    def exchange(self, messages: Messages, step: Step) -> None:
        """Adds the gradients that are complete after a step, and those that arrive."""
        for transfer in step.grad_sends:
            messages.send(self._out.pop(transfer.origin), transfer, "dK/dV", last=True)
        for transfer in step.grad_recvs:
            self._in.append((transfer, messages.receive(self.own, transfer, "dK/dV")))

    def add_arrived(self, following: int, held_rows: dict[int, int]) -> None:
        """Adds what was due before the step `following`, in the order it was posted, always."""
        arrived = [entry for entry in self._in if entry[0].due < following]
        self._in = [entry for entry in self._in if entry[0].due >= following]
        for transfer, pair in arrived:
            _add_rows(self.of(transfer.origin, held_rows[transfer.origin]), transfer, pair)
            assert pair.lease is not None
            self._transport.pool.give_back(pair.lease)


def _add_rows(into: Pair, transfer: Transfer, pair: Pair) -> None:
    if transfer.num_ranges > FEW_RANGES:
        rows = transfer.index().to(pair.k.device)
        into.k.index_add_(2, rows, pair.k)
        into.v.index_add_(2, rows, pair.v)
        return
    at = 0
    for begin, end in transfer.rows:
        into.k[:, :, begin:end] += pair.k[:, :, at : at + end - begin]
        into.v[:, :, begin:end] += pair.v[:, :, at : at + end - begin]
        at += end - begin
