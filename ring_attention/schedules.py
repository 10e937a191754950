# SPDX-License-Identifier: BSD-3-Clause
"""How blocks travel: the arguments of ``plan`` that say so, once they fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _planner
from .mask_algebra import at_least, refuse

if TYPE_CHECKING:
    from .layout import Layout
    from .shapes import Shapes

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


def travellers_of(traveller: str | tuple[str, str], generator: str) -> tuple[str, str] | None:
    """What travels in the forward and in the backward; None if that is to be chosen."""
    if traveller == "auto":
        return None if generator == "direct" else ("kv", "kv")
    both = (traveller, traveller) if isinstance(traveller, str) else tuple(traveller)
    if len(both) != 2 or not set(both) <= {"kv", "q"}:
        expected = 'a traveller of "kv", "q", "auto" or a pair of "kv" and "q"'
        refuse("plan", expected, repr(traveller), "the pair is for forward and backward")
    if "q" in both and generator != "direct":
        refuse("plan", f'traveller "kv" with {generator}', repr(traveller), 'q needs "direct"')
    return both[0], both[1]


# Of a larger ring the rows of so many ranks are counted.
_COUNTED = 4


def cheapest(
    shapes: Shapes, reads: _planner.Reads, q_layout: Layout, k_layout: Layout
) -> tuple[str, str]:
    """What has fewer bytes to travel, forward and backward: the same on every rank."""
    lengths = {"kv": k_layout.length, "q": q_layout.length}

    def each(what: str, backward: bool) -> int:
        return shapes.block_bytes(what, backward, 1) + shapes.home_bytes(what, backward, 1)

    def chosen(rows: dict[str, int], backward: bool) -> str:
        return "q" if rows["q"] * each("q", backward) < rows["kv"] * each("kv", backward) else "kv"

    # Few masks prune the rows of K/V more than twice as much as those of Q, or the other way round.
    clear = all(
        not 0.5 < lengths["q"] * each("q", back) / max(lengths["kv"] * each("kv", back), 1) < 2.0
        for back in (False, True)
    )
    rows = (
        lengths
        if clear
        else {what: _rows(reads, q_layout.world_size, what == "q") for what in lengths}
    )
    return chosen(rows, False), chosen(rows, True)


def _rows(reads: _planner.Reads, world_size: int, queries: bool) -> int:
    """The rows that arrive at all ranks or, of many, at some."""
    count = min(world_size, _COUNTED)
    ranks = {i * (world_size - 1) // max(count - 1, 1) for i in range(count)}
    made = [reads.schedule(rank, "direct", 1, 1, queries) for rank in ranks]
    return sum(t.ranges.rows for steps in made for step in steps for t in step.recvs)
