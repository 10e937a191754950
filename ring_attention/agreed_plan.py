# SPDX-License-Identifier: BSD-3-Clause
"""Whether tensors are this rank's shards under a plan, and whether all ranks hold the same plan."""

from typing import Any

from torch import Tensor

from . import agreement, checks
from .groups import transport_of
from .plan import Plan
from .ring import Transport


def check_shards(where: str, plan: Plan, transport: Transport, q: Tensor, k: Tensor) -> None:
    rank, size = transport.rank, transport.size
    if (plan.rank, plan.world_size) != (rank, size):
        raise ValueError(
            f"{where}: expected a plan for rank {rank} of {size}, got one for rank {plan.rank} of "
            f"{plan.world_size}; make it with plan(..., group=group)"
        )
    for name, x, layout in (("q", q, plan.q_layout), ("k", k, plan.k_layout)):
        if x.shape[2] != layout.sizes[rank]:
            raise ValueError(
                f"{where}: expected {name}.shape[2] == {layout.sizes[rank]}, the shard of rank "
                f"{rank} under {layout!r}, got {x.shape[2]}; shard with layout.shard({name}, "
                "group, dim=2)"
            )
    if plan.mask.batch not in (1, q.shape[0]):
        raise ValueError(
            f"{where}: expected a mask for {q.shape[0]} samples (or one for all), got one for "
            f"{plan.mask.batch}; q.shape[0] is the batch"
        )


def agreed_fields(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
    return {
        "dtype": str(q.dtype).removeprefix("torch."),
        "batch": str(q.shape[0]),
        "heads": str(q.shape[1]),
        "kv_heads": str(k.shape[1]),
        "head_dim": str(k.shape[3]),
        "v_head_dim": str(v.shape[3]),
        "mask": repr(plan.mask),
        "q_layout": repr(plan.q_layout),
        "k_layout": repr(plan.k_layout),
        "invariant": "no" if plan.tiles is None else f"{plan.tiles.count} tiles",
        "plan": f"{plan.digest:016x}",
    }


def agree(plan: Plan, group: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checks once that all ranks of a group hold the same plan for the same kind of tensors.

    Collective. Calls of `attention(..., plan=plan, group=group)` with tensors of these shapes and
    dtypes then post at once; others are refused.

    Args:
        plan: this rank's plan.
        group: as in `attention`.
        q, k, v: tensors (also meta or fake ones) as the calls will pass them.

    Raises:
        RingError: ranks disagree (all of them are told which field differs), or one never arrived.
    """
    transport = transport_of(group)
    if transport.size == 1:
        return
    where = "ring_attention.agree"
    checks.attention("agree", q, k, v)
    check_shards(where, plan, transport, q, k)
    fields = agreed_fields(plan, q, k, v)
    agreement.check(transport, {"call": "agree", **fields})
    transport.book.agreed[plan.digest] = fields
    transport.warm_up(q.device)


def check_agreement(
    transport: Transport, call: str, plan: Plan, q: Tensor, k: Tensor, v: Tensor
) -> None:
    if transport.size == 1:
        return
    fields = agreed_fields(plan, q, k, v)
    agreed = transport.book.agreed.get(plan.digest)
    if agreed is None:
        agreement.check(transport, {"call": call, **fields})
        transport.warm_up(q.device)
        return
    for name, value in fields.items():
        if agreed[name] != value:
            raise ValueError(
                f"ring_attention.attention: expected {name} == {agreed[name]}, as the ranks agreed "
                f"for this plan, got {value}; call agree again for other tensors"
            )
