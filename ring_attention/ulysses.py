# SPDX-License-Identifier: BSD-3-Clause
"""Ulysses around a ring: heads are dealt to neighbours, then their rows go around a ring.

Note [ulysses]. Groups of `degree` consecutive ranks deal their heads to each other (Jacobs et al.,
"DeepSpeed Ulysses", 2023): before, each has all heads of its own rows, after, its share of the
heads of the rows of the whole group. For each share the groups then form a ring of P / degree
ranks, with a plan of its own over the merged layout. Rows merge in the order of their positions, so
all that holds for a ring (any mask, any length, exact) holds here. A K/V head must have one owner
in a group: a head that several ranks share would have gradients that are rounded before they are
summed. So the degree divides kv_heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from . import trace
from .buffers import Lease
from .events import Phase
from .groups import register
from .layout import Layout
from .merged import rows_of
from .ops import empty_output
from .rank_plan import Plan
from .ring import Message, Transport
from .subring import Subring

_FEW_RANGES = 16


def check_heads(where: str, plan: Plan, heads: int, kv_heads: int) -> None:
    """Refuses heads that the Ulysses degree does not divide, and says which splits fit."""
    if kv_heads % plan.ulysses == 0:
        return
    most = gcd(kv_heads, plan.world_size)
    fits = [(plan.world_size // n, n) for n in range(1, most + 1) if most % n == 0]
    raise ValueError(
        f"{where}: expected kv_heads to be a multiple of the Ulysses degree {plan.ulysses}, got "
        f"{kv_heads} (for {heads} heads); a K/V head has one owner in a group. {plan.world_size} "
        f"ranks fit as (ring, ulysses) = {', '.join(map(str, fits))}"
    )


def ring_of(plan: Plan, transport: Transport) -> Transport:
    """This rank's ring: the ranks with its place in every Ulysses group."""
    ring = transport.rings.get(plan.ulysses)
    if ring is None:
        place = transport.rank % plan.ulysses
        ring = Subring(transport, range(place, transport.size, plan.ulysses))
        transport.rings[plan.ulysses] = ring
        register(ring)
    return ring


class _Exchange:
    """One all-to-all in a Ulysses group: a message to and from every other member."""

    def __init__(self, plan: Plan, transport: Transport, phase: Phase) -> None:
        self._transport, self._phase = transport, phase
        self._first = transport.rank - transport.rank % plan.ulysses
        self._others = [m for m in range(plan.ulysses) if self._first + m != transport.rank]

    def run(
        self, sends: dict[int, list[Tensor]], shapes: dict[int, list[torch.Size]]
    ) -> dict[int, list[Tensor]]:
        """Sends tensors to every other member and returns those that came, of these shapes.

        Elements of 4 bytes and more come first or follow a multiple of 16 bytes: nothing is
        misaligned.
        """
        start_s = trace.now()
        posting = trace.begin("post", self._phase, self._transport, -1)
        pool, leases, messages, received = self._transport.pool, [], [], {}
        for member in self._others:
            like = sends[member]
            out = pool.lease(sum(x.nbytes for x in like), like[0], torch.uint8)
            for x, into in zip(like, _views(out, [x.shape for x in like], like), strict=True):
                into.copy_(x)
            nbytes = sum(s.numel() * x.itemsize for s, x in zip(shapes[member], like, strict=True))
            come = pool.lease(nbytes, like[0], torch.uint8)
            received[member] = _views(come, shapes[member], like)
            leases += [out, come]
            peer = self._first + member
            for lease, sending in ((out, True), (come, False)):
                if lease.flat.numel():
                    messages.append(Message(lease.flat, peer, "heads", 0, sending))
        self._leases = leases
        pending = self._transport.post(messages)
        posting.end(messages)
        waiting = trace.begin("wait", self._phase, self._transport, -1)
        pending.wait()
        waiting.end(messages)
        trace.emit("transfer", self._phase, self._transport, -1, start_s, messages)
        return received

    def release(self) -> None:
        """Gives the buffers back, once what came has been copied."""
        for lease in self._leases:
            self._transport.pool.give_back(lease)


def _views(lease: Lease, shapes: Sequence[torch.Size], like: Sequence[Tensor]) -> list[Tensor]:
    views, at = [], 0
    for shape, x in zip(shapes, like, strict=True):
        nbytes = shape.numel() * x.itemsize
        views.append(lease.flat[at : at + nbytes].view(x.dtype).view(shape))
        at += nbytes
    return views


def _spread(
    plan: Plan, transport: Transport, phase: Phase, layouts: Sequence[Layout], *own: Tensor
) -> list[Tensor]:
    """Own rows of all heads [B, H, S, ...] to all rows of own heads [B, H / degree, S', ...]."""
    degree, place = plan.ulysses, transport.rank % plan.ulysses
    first = transport.rank - place

    def share(x: Tensor, member: int) -> Tensor:
        heads = x.shape[1] // degree
        return x[:, member * heads : (member + 1) * heads]

    def shape(x: Tensor, rows: int) -> torch.Size:
        return torch.Size((x.shape[0], x.shape[1] // degree, rows, *x.shape[3:]))

    sends = {m: [share(x, m) for x in own] for m in range(degree)}
    shapes = {
        m: [shape(x, lay.sizes[first + m]) for x, lay in zip(own, layouts, strict=True)]
        for m in range(degree)
    }
    exchange = _Exchange(plan, transport, phase)
    received = exchange.run(sends, shapes) | {place: sends[place]}
    wholes = []
    for i, (x, layout) in enumerate(zip(own, layouts, strict=True)):
        rows = sum(layout.sizes[first : first + degree])
        whole = x.new_empty(shape(x, rows))
        for member in range(degree):
            ranges, index = rows_of(layout, degree, first + member)
            part = received[member][i]
            if len(ranges) > _FEW_RANGES:
                whole.index_copy_(2, index.to(x.device), part)
                continue
            at = 0
            for begin, end in ranges:
                whole[:, :, begin:end] = part[:, :, at : at + end - begin]
                at += end - begin
        wholes.append(whole)
    exchange.release()
    return wholes


def _gather(
    plan: Plan,
    transport: Transport,
    phase: Phase,
    layouts: Sequence[Layout],
    wholes: Sequence[Tensor],
    into: Sequence[Tensor],
) -> None:
    """The inverse of _spread, into tensors [B, H, S, ...]."""
    degree, place = plan.ulysses, transport.rank % plan.ulysses
    first = transport.rank - place

    def part(whole: Tensor, layout: Layout, member: int) -> Tensor:
        ranges, index = rows_of(layout, degree, first + member)
        if len(ranges) == 1:
            return whole[:, :, ranges[0][0] : ranges[0][1]]
        return whole.index_select(2, index.to(whole.device))

    sends = {
        m: [part(x, layout, m) for x, layout in zip(wholes, layouts, strict=True)]
        for m in range(degree)
    }
    own = [x.shape for x in sends[place]]
    exchange = _Exchange(plan, transport, phase)
    received = exchange.run(sends, {m: own for m in range(degree)}) | {place: sends[place]}
    for i, x in enumerate(into):
        heads = x.shape[1] // degree
        for member in range(degree):
            x[:, member * heads : (member + 1) * heads] = received[member][i]
    exchange.release()


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, transport: Transport, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.transport = plan, transport
        ctx.like = [(x.shape, x.dtype, x.device) for x in own]
        return tuple(_spread(plan, transport, "forward", _qkv(plan), *own))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        into = [torch.empty(s, dtype=dtype, device=device) for s, dtype, device in ctx.like]
        _gather(ctx.plan, ctx.transport, "backward", _qkv(ctx.plan), grads, into)
        return None, None, *into


def _qkv(plan: Plan) -> list[Layout]:
    return [plan.q_layout, plan.k_layout, plan.k_layout]


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, transport: Transport, into: Sequence[Tensor], *wholes: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.transport = plan, transport
        _gather(plan, transport, "forward", [plan.q_layout] * 2, wholes, into)
        return tuple(into)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layouts = [ctx.plan.q_layout] * 2
        return None, None, None, *_spread(ctx.plan, ctx.transport, "backward", layouts, *grads)


def to_heads(
    plan: Plan, transport: Transport, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the heads of all rows of its Ulysses group; differentiable, collective.

    Args:
        q, k, v: as in `attention`; kv_heads is a multiple of plan.ulysses.

    Returns:
        q [B, H / degree, S', D], k and v alike, S' rows merged in the order of their positions.
    """
    q, k, v = _ToHeads.apply(plan, transport, q, k, v)
    return q, k, v


def to_rows(
    plan: Plan, transport: Transport, q: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The way back, of out and lse, to all heads of this rank's rows; differentiable, collective.

    Args:
        q, v: as in `attention`: out gets q's dimension order.
        out: [B, H / degree, S', Dv].
        lse: [B, H / degree, S'].
    """
    out, lse = _ToRows.apply(plan, transport, empty_output(q.detach(), v.detach()), out, lse)
    return out, lse
