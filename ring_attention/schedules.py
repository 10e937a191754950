# SPDX-License-Identifier: BSD-3-Clause
"""How blocks travel: the arguments of ``plan`` that say so, once they fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _planner
from .layout import Layout
from .mask_algebra import at_least, refuse

GENERATORS: tuple[str, ...] = _planner.GENERATORS


def generator_of(
    world_size: int, generator: str, resident: int, ranks_per_node: int | None
) -> tuple[str, int]:
    """The generator and the ranks per node that were asked for, once they fit together."""
    if generator not in ("auto", *GENERATORS):
        refuse(
            "plan", f"a generator of {('auto', *GENERATORS)}", repr(generator), "pass one of them"
        )
    at_least("plan", "resident", resident, 1, "it counts travelling blocks")
    if generator == "auto":
        generator = "direct" if ranks_per_node is None else "double"
    if generator != "double":
        if ranks_per_node is not None:
            remedy = 'leave it out, or pass generator="double"'
            refuse("plan", f"no ranks_per_node with {generator}", ranks_per_node, remedy)
        if generator != "direct" and resident > 1:
            refuse(
                "plan", f"resident == 1 with {generator}", resident, 'generator="direct" has more'
            )
        return generator, 1
    if resident > 1:
        refuse("plan", "resident == 1 with double", resident, 'generator="direct" has more')
    fits = [n for n in range(2, world_size + 1) if world_size % n == 0]
    if ranks_per_node not in fits:
        remedy = 'pass generator="direct" for a ring without nodes'
        refuse("plan", f"ranks_per_node of {fits} with double", ranks_per_node, remedy)
    assert ranks_per_node is not None
    return generator, ranks_per_node


def nodes_of_ring(world_size: int, ranks_per_node: int | None, ulysses: int) -> int | None:
    """The ranks per node of a ring under Ulysses; None if there is one ring rank in each."""
    fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
    if ulysses not in fits:
        refuse("plan", f"ulysses of {fits}", ulysses, f"it splits {world_size} ranks")
    if ranks_per_node is None:
        return None
    if ranks_per_node % ulysses:
        remedy = "a Ulysses group does not cross nodes"
        refuse("plan", f"ulysses to divide ranks_per_node = {ranks_per_node}", ulysses, remedy)
    return None if ulysses in (ranks_per_node, world_size) else ranks_per_node // ulysses


def travellers_of(
    traveller: str | tuple[str, str],
    like: tuple[Tensor, Tensor, Tensor] | None,
    q_layout: Layout,
    k_layout: Layout,
    generator: str,
) -> tuple[str, str]:
    """What travels in the forward and in the backward."""
    if traveller == "auto":
        if like is None:
            refuse("plan", 'like with traveller="auto"', None, "pass like=(q, k, v)")
        return _cheapest(*like, q_layout, k_layout) if generator == "direct" else ("kv", "kv")
    both = (traveller, traveller) if isinstance(traveller, str) else tuple(traveller)
    if len(both) != 2 or not set(both) <= {"kv", "q"}:
        expected = 'a traveller of "kv", "q", "auto" or a pair of "kv" and "q"'
        refuse("plan", expected, repr(traveller), "the pair is for forward and backward")
    if "q" in both and generator != "direct":
        refuse("plan", f'traveller "kv" with {generator}', repr(traveller), 'q needs "direct"')
    return both[0], both[1]


def _cheapest(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
) -> tuple[str, str]:
    """By bytes sent if every rank needs every row: what goes out, and what comes home in fp32."""
    (_, heads, _, head_dim), (_, kv_heads, _, v_head_dim) = q.shape, v.shape
    element, wide = q.element_size(), 8 if q.dtype == torch.float64 else 4
    queries, keys = q_layout.length * heads, k_layout.length * kv_heads
    both = head_dim + v_head_dim
    forward = queries * (head_dim * element + (v_head_dim + 2) * wide) < keys * both * element
    backward = queries * (both * element + 2 * wide + head_dim * wide) < keys * both * (
        element + wide
    )
    return "q" if forward else "kv", "q" if backward else "kv"
