# SPDX-License-Identifier: BSD-3-Clause
"""The ring: a short program that runs a plan. It has no cases; the plan has them all.

    for step in plan.steps:
        post the K/V that later steps read           (backward: and the gradients of the last fold)
        fold the blocks that are here                computing hides what is under way
        wait

Note [order of messages]. K/V of hop h are the event 2h, gradients of the blocks folded at hop t the
event 2t + 3: after K/V of hop t + 1, which are needed sooner, and before those of t + 2. Every rank
posts in the order of events and waits for an event only after it has posted all its own up to that
one. So no ring of ranks can wait for itself, and a backend that matches messages by order (NCCL)
matches the right ones, whatever the mask pruned.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import ops, trace
from .buffers import Lease
from .plan import Plan, Step, Transfer
from .ring import Message, Transport

Kind = Literal["K/V", "dK/dV"]

# Striped shards of packed documents send thousands of short ranges: more than these go by index.
_FEW_RANGES = 16


def _split(flat: Tensor, k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Views a message as its two halves, [B, G, rows, D] and [B, G, rows, Dv]."""
    batch, kv_heads, _, head_dim = k.shape
    numel = batch * kv_heads * rows * head_dim
    return (
        flat[:numel].view(batch, kv_heads, rows, head_dim),
        flat[numel:].view(batch, kv_heads, rows, v.shape[3]),
    )


@dataclass(frozen=True, eq=False)
class _Pair:
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


class _Hop:
    """The messages of one step, from packing to completion."""

    def __init__(self, transport: Transport, phase: trace.Phase, step: int) -> None:
        self._transport = transport
        self._phase = phase
        self._step = step
        self._messages: list[tuple[int, Message]] = []  # with their event, see the Note
        self._done: list[Lease] = []  # free once the hop is complete
        self._start_s = trace.now()

    def _add(self, flat: Tensor, transfer: Transfer, kind: Kind, sending: bool) -> None:
        event = 2 * transfer.hop + (0 if kind == "K/V" else 3)
        message = Message(flat, transfer.peer, kind, transfer.hop, sending)
        self._messages.append((event, message))

    def send(self, pair: _Pair, transfer: Transfer, kind: Kind) -> None:
        """Sends some rows of a pair; one that is already packed as it is goes without a copy."""
        lease = pair.lease
        if lease is None or transfer.num_rows != pair.rows:
            lease = _pack(self._transport, pair, transfer)
            self.free_after(lease)
        self._add(lease.flat, transfer, kind, sending=True)

    def free_after(self, lease: Lease | None) -> None:
        """Gives a buffer back once the hop is complete."""
        if lease is not None:
            self._done.append(lease)

    def receive(self, like: _Pair, transfer: Transfer, kind: Kind) -> _Pair:
        """Receives rows into a buffer of their own; they are there after `wait`."""
        rows = transfer.num_rows
        lease = self._transport.pool.lease(like.numel(rows), like.k)
        self._add(lease.flat, transfer, kind, sending=False)
        return _Pair(*_split(lease.flat, like.k, like.v, rows), lease)

    def post(self) -> None:
        messages = [message for _, message in sorted(self._messages, key=lambda pair: pair[0])]
        self._pending = self._transport.post(messages)
        self._emit("post", self._start_s)

    def wait(self) -> None:
        start_s = trace.now()
        self._pending.wait()
        for lease in self._done:
            self._transport.pool.give_back(lease)
        self._emit("wait", start_s)
        self._emit("transfer", self._start_s)

    def _emit(self, name: trace.Name, start_s: float) -> None:
        if self._messages:
            nbytes = sum(message.nbytes for _, message in self._messages)
            trace.emit(name, self._phase, self._transport.rank, self._step, start_s, nbytes)


def _pack(transport: Transport, pair: _Pair, transfer: Transfer) -> Lease:
    count = transfer.num_rows
    lease = transport.pool.lease(pair.numel(count), pair.k)
    k, v = _split(lease.flat, pair.k, pair.v, count)
    if transfer.num_ranges > _FEW_RANGES:
        rows = transfer.index(pair.k.device)
        torch.index_select(pair.k, 2, rows, out=k)
        torch.index_select(pair.v, 2, rows, out=v)
        return lease
    at = 0
    for begin, end in transfer.rows:
        k[:, :, at : at + end - begin].copy_(pair.k[:, :, begin:end])
        v[:, :, at : at + end - begin].copy_(pair.v[:, :, begin:end])
        at += end - begin
    return lease


class _Blocks:
    """The K/V blocks a rank holds, by origin: its own, and what travels."""

    def __init__(self, transport: Transport, own: _Pair) -> None:
        self._transport = transport
        self._own = own
        self._held = {transport.rank: own}

    def __getitem__(self, origin: int) -> _Pair:
        return self._held[origin]

    def exchange(self, hop: _Hop, step: Step) -> None:
        """Adds the K/V messages of a step."""
        for transfer in step.sends:
            hop.send(self[transfer.origin], transfer, "K/V")
        for transfer in step.recvs:
            self._held[transfer.origin] = hop.receive(self._own, transfer, "K/V")

    def release(self, origins: Iterable[int]) -> None:
        for origin in origins:
            pair = self._held.pop(origin)
            if pair.lease is not None:
                self._transport.pool.give_back(pair.lease)


def forward(
    plan: Plan,
    transport: Transport,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Runs a plan: out [B, H, Sq, Dv] in q's dimension order and lse [B, H, Sq]."""
    out, lse = ops.empty_output(q, v)
    launches = [step.number for step in plan.steps if step.folds]
    # One launch starts and finishes in registers; more carry the state between them.
    acc, m, l = ops.empty_state(q, v) if len(launches) > 1 else (None, None, None)  # noqa: E741

    def fold(origins: Sequence[int], first: bool, last: bool) -> None:
        intervals = [plan.intervals(origin, q.device) for origin in origins]
        ops.block_forward_(
            q,
            [blocks[origin].k for origin in origins],
            [blocks[origin].v for origin in origins],
            [key_begin for key_begin, _ in intervals],
            [key_end for _, key_end in intervals],
            sinks if first else None,
            acc,
            m,
            l,
            out if last else None,
            lse if last else None,
            first=first,
            last=last,
            scale=scale,
            softcap=softcap,
        )

    blocks = _Blocks(transport, _Pair(k, v))
    for step in plan.steps:
        hop = _Hop(transport, "forward", step.number)
        blocks.exchange(hop, step)
        hop.post()
        if step.folds:
            start_s = trace.now()
            fold(step.folds, step.number == launches[0], step.number == launches[-1])
            trace.emit("compute", "forward", transport.rank, step.number, start_s)
        hop.wait()
        blocks.release(step.release)
    if not launches:  # no row sees a key: out = 0, lse = -inf or the sink
        fold([], first=True, last=True)
    return out, lse


class _Gradients:
    """A rank's dK/dV: its own accumulator, and contributions on their way home."""

    def __init__(self, transport: Transport, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self._transport = transport
        self.own = _Pair(
            torch.zeros(k.shape, dtype=dtype, device=k.device),
            torch.zeros(v.shape, dtype=dtype, device=v.device),
        )
        self._out: dict[int, _Pair] = {}
        self._in: list[tuple[Transfer, _Pair]] = []

    def of(self, origin: int, block: _Pair) -> _Pair:
        """Where a fold of `origin`'s block accumulates; never a buffer that is travelling."""
        if origin == self._transport.rank:
            return self.own
        lease = self._transport.pool.lease(self.own.numel(block.rows), self.own.k, self.own.k.dtype)
        lease.flat.zero_()
        pair = _Pair(*_split(lease.flat, self.own.k, self.own.v, block.rows), lease)
        self._out[origin] = pair
        return pair

    def exchange(self, hop: _Hop, step: Step) -> None:
        """Adds the gradients of the blocks folded in a step, and those for own rows."""
        for transfer in step.grad_sends:
            pair = self._out.pop(transfer.origin)
            hop.send(pair, transfer, "dK/dV")
            hop.free_after(pair.lease)
        for transfer in step.grad_recvs:
            self._in.append((transfer, hop.receive(self.own, transfer, "dK/dV")))

    def add_arrived(self) -> None:
        """Adds what a hop brought to the own rows: in the order of hops, always."""
        for transfer, pair in self._in:
            if transfer.num_ranges > _FEW_RANGES:
                rows = transfer.index(pair.k.device)
                self.own.k.index_add_(2, rows, pair.k)
                self.own.v.index_add_(2, rows, pair.v)
            else:
                at = 0
                for begin, end in transfer.rows:
                    self.own.k[:, :, begin:end] += pair.k[:, :, at : at + end - begin]
                    self.own.v[:, :, begin:end] += pair.v[:, :, at : at + end - begin]
                    at += end - begin
            assert pair.lease is not None
            self._transport.pool.give_back(pair.lease)
        self._in.clear()


def backward(
    plan: Plan,
    transport: Transport,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the same K/V plan again; gradients go straight home while the next block computes.

    The own block is computed in two parts: one first, to hide the first K/V hop, one last, to hide
    the last gradient hop.

    Returns:
        dq, dk, dv in their inputs' dtypes, and dsinks ([0] without sinks): this rank's part of the
        sum over the ring.
    """
    delta = ops.delta(out, dout, dlse)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    blocks = _Blocks(transport, _Pair(k, v))
    gradients = _Gradients(transport, k, v, lse.dtype)

    def fold(origins: Sequence[int], step: int, keys: tuple[int, int] | None = None) -> None:
        start_s = trace.now()
        intervals = [plan.intervals(origin, q.device, keys) for origin in origins]
        into = [gradients.of(origin, blocks[origin]) for origin in origins]
        ops.block_backward_(
            q,
            dout,
            lse,
            delta,
            [blocks[origin].k for origin in origins],
            [blocks[origin].v for origin in origins],
            [key_begin for key_begin, _ in intervals],
            [key_end for _, key_end in intervals],
            dq,
            [pair.k for pair in into],
            [pair.v for pair in into],
            scale=scale,
            softcap=softcap,
        )
        trace.emit("compute", "backward", transport.rank, step, start_s)

    own = transport.rank
    sees_own = any(own in step.folds for step in plan.steps)
    previous: Step | None = None
    for step in plan.steps:
        hop = _Hop(transport, "backward", step.number)
        blocks.exchange(hop, step)
        if previous is not None:
            gradients.exchange(hop, previous)
        hop.post()
        if own in step.folds:
            fold([own], step.number, keys=(0, plan.own_split))
        if others := [origin for origin in step.folds if origin != own]:
            fold(others, step.number)
        hop.wait()
        gradients.add_arrived()
        blocks.release(step.release)
        previous = step
    last = plan.steps[-1]
    hop = _Hop(transport, "backward", last.number + 1)
    gradients.exchange(hop, last)
    hop.post()
    if sees_own:
        fold([own], last.number + 1, keys=(plan.own_split, k.shape[2]))
    hop.wait()
    gradients.add_arrived()
    dsinks = lse.new_empty(0) if sinks is None else ops.sink_gradient(sinks, lse, delta)
    return dq.to(q.dtype), gradients.own.k.to(k.dtype), gradients.own.v.to(v.dtype), dsinks
