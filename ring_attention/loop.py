# SPDX-License-Identifier: BSD-3-Clause
"""The ring: a short program that runs a plan. It has no cases; the plan has them all.

    for step in plan.steps:
        post the K/V that later steps read           (backward: and the gradients of the last fold)
        fold the blocks that are here                computing hides what is under way
        wait for what is due before the next step

The order in which ranks post is told in messages.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import ops, trace
from .messages import Blocks, Gradients, Messages, Pair
from .plan import Plan, Step
from .ring import Transport


def _steps(plan: Plan) -> Iterator[tuple[Step, int]]:
    """The steps, each with the number of the one that follows it."""
    numbers = [step.number for step in plan.steps[1:]]
    yield from zip(plan.steps, [*numbers, plan.steps[-1].number + 1], strict=True)


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
        intervals = [plan.intervals(origin) for origin in origins]
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

    messages = Messages(transport, "forward")
    blocks = Blocks(transport, Pair(k, v))
    for step, following in _steps(plan):
        blocks.exchange(messages, step)
        messages.post(step.number, following)
        if step.folds:
            start_s = trace.now()
            fold(step.folds, step.number == launches[0], step.number == launches[-1])
            trace.emit("compute", "forward", transport.traced_rank, step.number, start_s)
        messages.wait(step.number, following)
        blocks.release(step.release)
    if not launches:  # no row sees a key: out = 0, lse = -inf or the sink
        fold([], first=True, last=True)
    return out, lse


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
    messages = Messages(transport, "backward")
    blocks = Blocks(transport, Pair(k, v))
    gradients = Gradients(transport, k, v, lse.dtype)

    def fold(origins: Sequence[int], step: int, keys: tuple[int, int] | None = None) -> None:
        start_s = trace.now()
        intervals = [plan.intervals(origin) for origin in origins]
        if keys is not None:
            intervals = [(b.clamp(min=keys[0]), e.clamp(max=keys[1])) for b, e in intervals]
        into = [gradients.of(origin, blocks[origin].rows) for origin in origins]
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
        trace.emit("compute", "backward", transport.traced_rank, step, start_s)

    own = transport.rank
    sees_own = any(own in step.folds for step in plan.steps)
    previous: Step | None = None
    for step, following in _steps(plan):
        blocks.exchange(messages, step)
        if previous is not None:
            gradients.exchange(messages, previous)
        messages.post(step.number, following)
        if own in step.folds:
            fold([own], step.number, keys=(0, plan.own_split))
        if others := [origin for origin in step.folds if origin != own]:
            fold(others, step.number)
        messages.wait(step.number, following)
        gradients.add_arrived(following, plan.held_rows)
        blocks.release(step.release)
        previous = step
    last = plan.steps[-1]
    gradients.exchange(messages, last)
    number, end = last.number + 1, plan.last_due + 1
    messages.post(number, end)
    if sees_own:
        fold([own], number, keys=(plan.own_split, k.shape[2]))
    messages.wait(number, end)
    gradients.add_arrived(end, plan.held_rows)
    dsinks = lse.new_empty(0) if sinks is None else ops.sink_gradient(sinks, lse, delta)
    return dq.to(q.dtype), gradients.own.k.to(k.dtype), gradients.own.v.to(v.dtype), dsinks
