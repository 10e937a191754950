# SPDX-License-Identifier: BSD-3-Clause
"""Attention around a ring as two operators, which autograd and compilers know."""

from typing import Any

import torch
from torch import Tensor

from . import invariant, loop, ops, queries
from .agreed_plan import check_agreement, check_shards
from .backward import backward
from .groups import transport_named
from .registry import plan_of


@torch.library.custom_op("ring_attention::ring_forward", mutates_args=())
def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: Tensor,
    scale: float,
    softcap: float,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Attention around the ring of `group`: out [B, H, Sq, Dv] and lse [B, H, Sq]."""
    transport, made = transport_named(group), plan_of(plan)
    check_shards("ring_attention.attention", made, transport, q, k)
    check_agreement(transport, "attention", made, q, k, v)
    run = queries.forward if made.traveller[0] == "q" else loop.forward
    run = run if made.tiles is None else invariant.forward
    return run(made, transport, q, k, v, sinks, scale, softcap)


@ring_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: Tensor,
    scale: float,
    softcap: float,
    group: str,
) -> tuple[Tensor, Tensor]:
    return ops.empty_output(q, v)


@torch.library.custom_op("ring_attention::ring_backward", mutates_args=())
def ring_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    plan: Tensor,
    scale: float,
    softcap: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients around the ring of `group`: dq, dk, dv and this rank's part of dsinks."""
    transport, made = transport_named(group), plan_of(plan)
    run = backward if made.tiles is None else invariant.backward
    return run(made, transport, dout, dlse, q, k, v, out, lse, sinks, scale, softcap)


@ring_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    plan: Tensor,
    scale: float,
    softcap: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = lse.new_empty(0 if sinks is None else sinks.shape[0])
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, plan, ctx.scale, ctx.softcap, ctx.group = inputs
    ctx.save_for_backward(q, k, v, sinks, plan, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, plan, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = torch.ops.ring_attention.ring_backward(
        dout, dlse, q, k, v, out, lse, sinks, plan, ctx.scale, ctx.softcap, ctx.group
    )
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None


ring_forward.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "ring_attention.attention: expected one backward, got a second derivative; the backward "
        "is not differentiable, detach its result"
    )


ring_backward.register_autograd(_no_double_backward)

# Independent ring calls must keep their order on every rank: a compiler that swapped two of them on
# one rank would complete them with swapped data. Private API, the same in torch 2.11 and 2.15.
for _op in ("ring_forward", "ring_backward"):
    torch.library._register_effectful_op(
        f"ring_attention::{_op}", torch._library.effects.EffectType.ORDERED
    )
