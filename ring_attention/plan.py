# SPDX-License-Identifier: BSD-3-Clause
"""Plans: what one rank of the ring folds, sends and receives, step by step.

Note [plan]. ``plan(mask, layout, rank=r)`` is pure and local: the same arguments give matching
plans on all ranks, without a word between them. Blocks travel compact: only rows that some query of
the receiver (or of a rank it forwards to) sees are sent, and steps nobody needs do not exist. The
ring loop runs any plan; how steps come about is up to a generator in csrc/plan/schedule.cpp.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .figures import Machine
from .groups import degrees_of
from .layout import Layout
from .make_plan import check, make_plan
from .mask_algebra import Mask, refuse
from .predict import predict
from .rank_plan import Plan
from .schedules import GENERATORS
from .shapes import Shapes

__all__ = ["GENERATORS", "Plan", "plan"]


def _predicted(
    mask: Mask,
    q_layout: Layout,
    k_layout: Layout,
    rank: int,
    ranks_per_node: int | None,
    shapes: Shapes,
    machine: Machine,
    **how: Any,
) -> Plan:
    """The plan that a prediction chose, or predicted as it was chosen by name."""
    if ranks_per_node not in (None, machine.ranks_per_node):
        remedy = "leave it out: the machine says it"
        refuse("plan", f"ranks_per_node == {machine.ranks_per_node}", ranks_per_node, remedy)
    prediction = predict(mask, q_layout, shapes, machine, k_layout=k_layout, **how)
    schedule = {"traveller": ("kv", "kv")} | prediction.schedule
    made = make_plan(mask, q_layout, k_layout, rank, **schedule)
    return dataclasses.replace(made, prediction=prediction)


def plan(
    mask: Mask,
    layout: Layout | None = None,
    *,
    q_layout: Layout | None = None,
    k_layout: Layout | None = None,
    rank: int | None = None,
    group: Any = None,
    generator: str = "auto",
    resident: int = 1,
    ranks_per_node: int | None = None,
    ulysses: int | None = None,
    traveller: str | tuple[str, str] = "auto",
    shapes: Shapes | None = None,
    machine: Machine | None = None,
    memory_bytes: float | None = None,
    invariant: bool | int = False,
) -> Plan:
    """Makes one rank's plan; local and pure: no communication.

    Args:
        mask: what is visible, in global positions.
        layout: of queries and keys; or q_layout and k_layout, if they differ (cross attention).
        rank, group: whose plan: a rank, or the group in which to look it up.
        generator: "direct" (own rows straight to every reader), "chain" (to the next rank, which
            forwards what is still read), "double" (a ring of nodes around rings inside nodes) or
            "auto": double with ranks_per_node, else direct, which never sends more rows than chain.
            Chain has two peers per rank whatever the world size.
        resident: travelling blocks that one step folds, in one launch, while as many arrive: 1 is a
            ring's memory, world_size - 1 gathers everything at once. For direct.
        ranks_per_node: how many consecutive ranks share a node with fast links, for double. A row
            crosses to every other node that reads it once, hidden behind a ring inside the node;
            gradients are summed inside a node before they cross.
        ulysses: deal the heads to so many consecutive ranks, with a ring of world_size / ulysses
            ranks for each share; divides the world size, ranks_per_node and the calls' kv_heads. A
            DeviceMesh of dimensions ("ring", "ulysses"), ("inter", "intra") or ("inter", "intra",
            "ulysses") as group says ulysses and ranks_per_node by itself.
        traveller: what goes around: "kv", or "q" and what belongs to it (forward: a state in fp32
            that comes home; backward: dO, and dQ that comes home), or a pair of these for forward
            and backward. "q" is for direct. It pays for few queries over a long cache and, in the
            backward, for as many heads of keys as of queries. "auto" takes what has fewer bytes to
            travel, for each direction, if `shapes` says what a row has; else "kv".
        shapes: heads and dtype of the calls; Shapes.of(q, k, v) has those of tensors.
        machine, memory_bytes: as in ``predict``, with shapes. What is left open (generator "auto",
            traveller "auto", no ulysses) is then what is predicted to be quickest within the
            memory, and the plan has a prediction.
        invariant: the same bits for every number of ranks, in out, lse and gradients: all sums are
            taken in an order that the mask fixes, over tiles of the whole sequence, 16 (True) or a
            given power of two. Lengths are multiples of it and shards are made of whole tiles, as
            those of Contiguous and Zigzag are; with K/V that travel, direct or along a chain.

    Raises:
        ValueError: arguments that do not fit together, or no schedule fits into memory.

    Example:
        >>> p = plan(Causal(), Zigzag(8, 2), rank=0)
        >>> p.steps[0].sends[0].rows, p.flops
        (((0, 2),), (10, 8))
    """
    if (layout is None) == (q_layout is None and k_layout is None):
        refuse("plan", "layout, or q_layout and k_layout", (layout, q_layout, k_layout), "pass one")
    q_layout, k_layout = (layout, layout) if layout is not None else (q_layout, k_layout)
    check(mask, q_layout, k_layout)
    assert q_layout is not None and k_layout is not None
    if (rank is None) == (group is None) and q_layout.world_size > 1:
        refuse("plan", "rank or group", (rank, group), "pass one of them")
    me = q_layout.rank_of(group if rank is None else rank)
    degrees = degrees_of(group)
    ulysses = degrees.get("ulysses") if ulysses is None else ulysses
    ranks_per_node = degrees.get("ranks_per_node") if ranks_per_node is None else ranks_per_node
    if machine is not None or memory_bytes is not None:
        if shapes is None or machine is None:
            got = {"shapes": shapes, "machine": machine, "memory_bytes": memory_bytes}
            refuse("plan", "both shapes and machine", got, "a prediction needs them")
        return _predicted(
            mask,
            q_layout,
            k_layout,
            me,
            ranks_per_node,
            shapes,
            machine,
            generator=generator,
            resident=resident,
            ulysses=ulysses,
            traveller=traveller,
            memory_bytes=memory_bytes,
            invariant=invariant,
        )
    if shapes is not None and traveller != "auto":
        remedy = "leave shapes out, or pass a machine for a prediction"
        refuse("plan", 'shapes without a machine only with traveller="auto"', traveller, remedy)
    return make_plan(
        mask,
        q_layout,
        k_layout,
        me,
        generator=generator,
        resident=resident,
        ranks_per_node=ranks_per_node,
        ulysses=1 if ulysses is None else ulysses,
        traveller=traveller,
        shapes=shapes,
        invariant=invariant,
    )
