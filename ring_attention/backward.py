# SPDX-License-Identifier: BSD-3-Clause
"""The backward of a ring call: what it begins and ends with, whatever travels."""

import torch
from torch import Tensor

from . import loop, ops, queries
from .rank_plan import Plan
from .ring import Transport


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
    """Runs a plan's backward: sums in the state's dtype, rounded once.

    Returns:
        dq, dk, dv in their inputs' dtypes, and dsinks ([0] without sinks): this rank's part of the
        sum over the ring.
    """
    delta = ops.delta(out, dout, dlse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    run = queries.add_gradients if plan.traveller[1] == "q" else loop.add_gradients
    run(plan, transport, q, k, v, dout, lse, delta, (dq, dk, dv), scale, softcap)
    dsinks = lse.new_empty(0) if sinks is None else ops.sink_gradient(sinks, lse, delta)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
