# SPDX-License-Identifier: BSD-3-Clause
"""Making the plan of one rank, once its schedule is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from . import _planner
from .layout import Layout
from .mask_algebra import Mask, refuse
from .merged import Merged
from .rank_plan import Plan
from .schedules import cheapest, generator_of, nodes_of_ring, travellers_of
from .shapes import Shapes
from .steps import step_of
from .tiles import tile_count, tiles_of


def check(mask: Any, q_layout: Any, k_layout: Any) -> None:
    """Refuses what no plan can be made of."""
    for name, value in (("q_layout", q_layout), ("k_layout", k_layout)):
        if not isinstance(value, Layout):
            refuse("plan", f"a Layout as {name}", repr(value), "for example Zigzag(length, ranks)")
    if not isinstance(mask, Mask):
        refuse("plan", "a Mask", repr(mask)[:80], "for example Causal()")
    if q_layout.world_size != k_layout.world_size:
        sizes = (q_layout.world_size, k_layout.world_size)
        refuse("plan", "layouts of one world size", sizes, "make both for the same group")
    largest = max(k_layout.sizes)
    if largest >= 2**31:
        refuse("plan", "shards below 2**31 rows", largest, "use more ranks")


def make_plan(
    mask: Mask,
    q_layout: Layout,
    k_layout: Layout,
    rank: int,
    *,
    generator: str = "auto",
    resident: int = 1,
    ranks_per_node: int | None = None,
    ulysses: int = 1,
    traveller: str | tuple[str, str] = "auto",
    shapes: Shapes | None = None,
    invariant: bool | int = False,
) -> Plan:
    """As ``plan``, of arguments that are checked, without a prediction."""
    count = tile_count(invariant)
    if ulysses == 1:
        return _one_ring(
            mask,
            q_layout,
            k_layout,
            rank,
            generator,
            resident,
            ranks_per_node,
            traveller,
            shapes,
            count,
        )
    if count:
        refuse("plan", "ulysses == 1 with invariant", ulysses, "it deals out heads")
    ring = _one_ring(
        mask,
        Merged.of(q_layout, ulysses),
        Merged.of(k_layout, ulysses),
        rank // ulysses,
        generator,
        resident,
        nodes_of_ring(q_layout.world_size, ranks_per_node, ulysses),
        traveller,
        shapes,
        0,
    )
    nodes = ranks_per_node or 1
    how = ring.generator, resident, nodes, ulysses, *ring.traveller
    return dataclasses.replace(
        ring,
        rank=rank,
        world_size=q_layout.world_size,
        q_layout=q_layout,
        k_layout=k_layout,
        ranks_per_node=nodes,
        digest=_digest(mask, q_layout, k_layout, *how),
        ulysses=ulysses,
        ring=ring,
    )


def _one_ring(
    mask: Mask,
    q_layout: Layout,
    k_layout: Layout,
    rank: int,
    generator: str,
    resident: int,
    ranks_per_node: int | None,
    traveller: str | tuple[str, str],
    shapes: Shapes | None,
    count: int,
) -> Plan:
    """A ring of all ranks; count: of the tiles of ``invariant``, 0 without."""
    generator, locals_ = generator_of(q_layout.world_size, generator, resident, ranks_per_node)
    both = travellers_of(traveller, generator)
    samples = mask.segments(q_layout.length, k_layout.length)
    reads = _planner.Reads(samples, q_layout.table, k_layout.table)
    tiles = None
    if count:
        if generator == "double":
            remedy = 'a double ring sums inside nodes: pass generator="direct" or "chain"'
            refuse("plan", "one ring with invariant", f"ranks_per_node = {locals_}", remedy)
        if both is not None and "q" in both:
            refuse("plan", "K/V to travel with invariant", repr(traveller), 'pass traveller="kv"')
        both = ("kv", "kv")
        tiles = tiles_of(count, samples, q_layout, k_layout)
        made = {"kv": tiles.steps(q_layout, k_layout, rank, generator, resident)}
    else:
        if both is None:
            both = "kv", "kv"
            if shapes is not None and q_layout.world_size > 1:
                both = cheapest(shapes, reads, q_layout, k_layout)
        made = {}
        for what in set(both):
            steps = reads.schedule(rank, generator, resident, locals_, what == "q")
            made[what] = tuple(map(step_of, steps))
    chosen = (generator, resident, locals_, *both, *((f"invariant {count}",) if count else ()))
    return Plan(
        rank=rank,
        world_size=q_layout.world_size,
        mask=mask,
        q_layout=q_layout,
        k_layout=k_layout,
        generator=generator,
        resident=resident,
        ranks_per_node=locals_,
        traveller=both,
        steps=made[both[0]],
        backward_steps=made[both[1]],
        digest=_digest(mask, q_layout, k_layout, *chosen),
        tiles=tiles,
        _reads=reads,
    )


def _digest(mask: Mask, q_layout: Layout, k_layout: Layout, *how: str | int) -> int:
    parts = [mask.to_dict(), q_layout.to_dict(), k_layout.to_dict(), *how]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
