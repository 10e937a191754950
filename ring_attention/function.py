# SPDX-License-Identifier: BSD-3-Clause
"""`attention`: its arguments, and the plan for a call without one."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import checks, ops, ring_ops, ulysses
from .agreed_plan import agreed_fields, check_agreement, check_shards
from .groups import degrees_of, traced_name, transport_of
from .layout import Contiguous, Layout
from .mask import Causal, Mask
from .plan import Plan
from .plan import plan as make_plan
from .ring import Transport
from .shapes import Shapes
from .tiles import tile_count

_CAUSAL = Causal()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = _CAUSAL,
    group: Any = None,
    layout: Layout | None = None,
    q_layout: Layout | None = None,
    k_layout: Layout | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    invariant: bool | int = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that may be sharded across the ranks of a group.

    Every rank passes its own shard and gets the output rows of its own queries. K/V blocks travel
    from rank to rank while each computes (Liu et al., "Ring Attention with Blockwise Transformers
    for Near-Infinite Context", 2023); the result is that of one device, with one rounding.

    Args:
        q: [B, H, Sq, D] in float32, bfloat16 or float16 (float64 too, slowly, for tests); D from
            16 to 256 in steps of 8. Any outer strides.
        k: [B, G, Sk, D], q's dtype; H must be a multiple of G (GQA, MQA: never repeated in memory).
        v: [B, G, Sk, Dv], q's dtype.
        mask: which keys a query sees, in *global* positions; causal by default.
        group: a ProcessGroup, a DeviceMesh (its dimension "cp", its only one, or ("ring",
            "ulysses") and ("inter", "intra"): see `plan`) or a virtual rank's group; None is this
            process only, even where a world is initialised.
        layout: how the sequence is sharded over the group; required with a group (or `plan`).
        q_layout, k_layout: instead of `layout`, where queries and keys are sharded differently.
        plan: a plan made beforehand, instead of mask and layouts. One that the ranks have agreed on
            (`agree`) is posted without a check between them. Without one, what travels, K/V or
            queries, is what has fewer bytes, for each direction: plan(traveller=) overrides it.
        scale: of q.k; 1/sqrt(D) by default. CPU kernels multiply q by it first, which has to stay
            finite in the state's dtype (with a softcap, q scale / softcap; else q scale log2(e)).
        softcap: c > 0 replaces a score u by c tanh(u / c).
        sinks: [H] learnable logits that join every softmax of their head; float32 (float64 for
            float64 inputs). Their gradient is this rank's part of the sum over the group.
        return_lse: also return the natural log-sum-exp of each row.
        invariant: the same bits for every number of ranks, as in `plan`; on one process too. Of
            sinks' gradient the first rank then has the whole sum, and the others zeros.

    Returns:
        out: [B, H, Sq, Dv] in q's dtype and dimension order, zero for rows that see no key.
        lse: [B, H, Sq] float32 (float64), with return_lse; -inf for such rows. Differentiable.

    Raises:
        ValueError, TypeError: an argument that cannot be honoured, before any communication.
        RingError: ranks disagree, one never arrived, or a message failed.

    Example:
        >>> layout = Zigzag(length, world_size)
        >>> q, k, v = (layout.shard(x, group, dim=2) for x in (q, k, v))
        >>> out = attention(q, k, v, group=group, layout=layout)
    """
    where = "ring_attention.attention"
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    softcap = 0.0 if softcap is None else float(softcap)
    checks.attention("attention", q, k, v, sinks=sinks, scale=scale, softcap=softcap)
    layouts = layout, q_layout, k_layout
    if plan is not None:
        _check_plan(where, plan, mask, layouts, invariant)
    if plan is not None and plan.ring is None and torch.compiler.is_compiling():
        # A traced region knows plan and group by a tensor and a name; the operator checks the rest.
        out, lse = ring_ops.ring_forward(
            q, k, v, sinks, plan.handle, scale, softcap, traced_name(group)
        )
    else:
        out, lse = _attend(q, k, v, sinks, mask, group, layouts, plan, scale, softcap, invariant)
    return (out, lse) if return_lse else out


def _check_plan(
    where: str,
    plan: Plan,
    mask: Mask,
    layouts: tuple[Layout | None, Layout | None, Layout | None],
    invariant: bool | int,
) -> None:
    """Whether the other arguments say nothing else than the plan that was passed."""
    if layouts != (None, None, None):
        raise ValueError(
            f"{where}: expected either plan or layouts, got both; a plan carries its layouts"
        )
    if mask is not _CAUSAL and mask != plan.mask:
        raise ValueError(
            f"{where}: expected mask to be the plan's {plan.mask!r}, got {mask!r}; "
            "a plan carries its mask"
        )
    if invariant is not False and (plan.tiles is None or tile_count(invariant) != plan.tiles.count):
        raise ValueError(
            f"{where}: expected a plan with invariant={invariant}, got {plan!r}; pass "
            "invariant to plan(...): a plan carries it"
        )


@torch.compiler.disable(
    reason="ring_attention makes plans on the host; pass plan= for a graph without a break"
)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mask: Mask,
    group: Any,
    layouts: tuple[Layout | None, Layout | None, Layout | None],
    plan: Plan | None,
    scale: float,
    softcap: float,
    invariant: bool | int,
) -> tuple[Tensor, Tensor]:
    where = "ring_attention.attention"
    transport = transport_of(group)
    if plan is None:
        plan = _plan_for(where, q, k, v, mask, group, *layouts, invariant)
    check_shards(where, plan, transport, q, k)
    if plan.ring is None:
        return _around_ring(q, k, v, sinks, plan, transport, scale, softcap)
    ulysses.check_heads(where, plan, q.shape[1], k.shape[1])
    check_agreement(transport, "attention", plan, q, k, v)
    mine = ulysses.to_heads(plan, transport, q, k, v)
    ring = ulysses.ring_of(plan, transport)
    # Ranks that agree about the whole agree about its parts.
    ring.book.agreed[plan.ring.digest] = agreed_fields(plan.ring, *mine)
    own_sinks = None
    if sinks is not None:
        own_sinks = sinks.chunk(plan.ulysses)[transport.rank % plan.ulysses].contiguous()
    shares = _around_ring(*mine, own_sinks, plan.ring, ring, scale, softcap)
    return ulysses.to_rows(plan, transport, q, v, *shares)


def _around_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: Plan,
    transport: Transport,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    if transport.size == 1 and plan.tiles is None:
        key_begin, key_end = plan.intervals(0, q.device)
        return ops.forward(q, k, v, key_begin, key_end, sinks, scale, softcap)
    return ring_ops.ring_forward(q, k, v, sinks, plan.handle, scale, softcap, transport.name)


def _plan_for(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    group: Any,
    layout: Layout | None,
    q_layout: Layout | None,
    k_layout: Layout | None,
    invariant: bool | int,
) -> Plan:
    transport, degrees = transport_of(group), degrees_of(group)
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{where}: expected mask to be a ring_attention mask such as Causal(), got "
            f"{type(mask).__name__}; dense masks never exist here, compose Causal, Window, "
            "Documents, ... with & and |"
        )
    if layout is not None and (q_layout is not None or k_layout is not None):
        raise ValueError(
            f"{where}: expected layout or q_layout and k_layout, got both; layout is for "
            "queries and keys sharded alike"
        )
    q_layout, k_layout = q_layout or layout, k_layout or layout
    if transport.name == "local":
        if q_layout is not None and q_layout.world_size > 1:
            raise ValueError(
                f"{where}: expected group with {q_layout!r}, got None; group=None is this process "
                "only, pass the process group that holds the shards"
            )
        q_layout = q_layout or Contiguous(q.shape[2], 1)
        k_layout = k_layout or Contiguous(k.shape[2], 1)
    if q_layout is None or k_layout is None:
        raise ValueError(
            f"{where}: expected layout with a group, got None; say how the sequence is sharded, "
            "e.g. layout=Zigzag(length, world_size)"
        )
    for name, made in (("q_layout", q_layout), ("k_layout", k_layout)):
        if made.world_size != transport.size:
            raise ValueError(
                f"{where}: expected {name}.world_size == {transport.size}, the size of the group, "
                f"got {made.world_size}; make the layout for this group"
            )
    return _cached_plan(
        mask,
        q_layout,
        k_layout,
        transport.rank,
        degrees.get("ulysses"),
        degrees.get("ranks_per_node"),
        # The batch is left at 1: it changes nothing about what is cheaper.
        Shapes(q.shape[1], k.shape[1], q.shape[3], v.shape[3], str(q.dtype).removeprefix("torch.")),
        tile_count(invariant),
    )


@lru_cache(maxsize=64)
def _cached_plan(
    mask: Mask,
    q_layout: Layout,
    k_layout: Layout,
    rank: int,
    ulysses: int | None,
    ranks_per_node: int | None,
    shapes: Shapes,
    tiles: int,
) -> Plan:
    return make_plan(
        mask,
        q_layout=q_layout,
        k_layout=k_layout,
        rank=rank,
        ulysses=ulysses,
        ranks_per_node=ranks_per_node,
        shapes=shapes,
        invariant=tiles or False,
    )
