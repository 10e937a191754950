# SPDX-License-Identifier: BSD-3-Clause
"""Predictions: what a schedule takes on given hardware, before anything is rented or run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import product
from math import gcd
from typing import Any

from .costs import Costs
from .explain import size
from .figures import Machine
from .layout import Layout
from .make_plan import check, make_plan
from .mask_algebra import Mask, refuse
from .merged import merges
from .prediction import Candidate, Prediction
from .rank_plan import Plan
from .schedules import travellers_of
from .shapes import Shapes
from .simulate import Timeline, simulate
from .stages import ring_bytes, stages
from .tiles import tile_count

# Rings up to this size are simulated whole; of larger ones this many ranks (half of it above 512).
WHOLE_RING, SAMPLED = 64, 8

Schedule = dict[str, Any]  # arguments of ``plan``
Travellers = tuple[str, str]


def predict(
    mask: Mask,
    layout: Layout,
    shapes: Shapes,
    machine: Machine,
    *,
    k_layout: Layout | None = None,
    generator: str = "auto",
    resident: int = 1,
    ulysses: int | None = None,
    traveller: str | Travellers = "auto",
    memory_bytes: float | None = None,
    backward: bool = True,
    invariant: bool | int = False,
) -> Prediction:
    """Predicts a schedule on hardware, or finds the quickest one that fits into memory.

    The schedules of all ranks are made and their steps simulated (of more than 64 ranks: of a few).
    Nothing is allocated: ten million tokens on 4,096 ranks take seconds.

    Args:
        mask, layout: as in ``plan``.
        shapes: heads, head dimensions, dtype, batch.
        machine: figures of device and links.
        k_layout: of keys, where they are laid out differently.
        generator: as in ``plan``; "auto" tries chain, direct with several numbers of resident
            blocks, and double where the machine has nodes.
        resident: for a generator that is named.
        ulysses: as in ``plan``; None: with "auto" every degree that divides kv_heads and the ranks
            is tried, else 1.
        traveller: as in ``plan``; "auto" tries what may travel, for each direction.
        memory_bytes: what attention may take of a rank's memory; the device's by default.
        backward: forward and backward, or forward only.
        invariant: as in ``plan``. Kernels are taken to be as quick on tiles as on whole blocks.

    Raises:
        ValueError: nothing fits into memory, or arguments that do not fit together.

    Example:
        >>> from ring_attention import Causal, Machine, Shapes, Zigzag
        >>> p = predict(Causal(), Zigzag(1 << 20, 8), Shapes(32, 8, 128), Machine("H100", "400G"))
        >>> p.schedule["generator"], p.exposed_s < 0.01 * p.seconds
        ('direct', True)
    """
    keys = k_layout or layout
    check(mask, layout, keys)
    world = layout.world_size
    limit = machine.device.memory_bytes if memory_bytes is None else memory_bytes
    count = tile_count(invariant)
    degrees = [1] if ulysses is None else [ulysses]
    if ulysses is None and generator == "auto" and not count:
        degrees = _degrees(shapes, layout, keys)
    elif shapes.kv_heads % degrees[0]:
        remedy = "a K/V head has one owner"
        refuse("predict", f"ulysses to divide kv_heads = {shapes.kv_heads}", ulysses, remedy)
    nodes = machine.ranks_per_node if world % machine.ranks_per_node == 0 else 1
    tried = [
        schedule
        for degree in degrees
        for schedule in _schedules(world, nodes, degree, generator, resident)
    ]
    if count:
        traveller = "kv" if traveller == "auto" else traveller
        tried = [
            {**schedule, "invariant": count}
            for schedule in tried
            if schedule["generator"] != "double" or generator == "double"
        ]
    trials = _Trials(mask, layout, keys, shapes, machine)
    made = [
        (schedule, both)
        for schedule in tried
        for both in _travellers(schedule["generator"], traveller, backward)
        if generator != "auto" or schedule["generator"] == "direct" or "q" not in both
    ]
    sample = world > SAMPLED and len(made) > 1
    found = [trials.predicted(*trial, backward, sample) for trial in made]
    fit = [p for p in found if p.memory_bytes <= limit]
    if not fit:
        least = min(found, key=lambda p: p.memory_bytes)
        refuse(
            "predict",
            f"a schedule within {size(limit)} per rank",
            f"{size(least.memory_bytes)} for {least.schedule} at least",
            "use more ranks, or raise memory_bytes",
        )
    # Alike within a part in a hundred: the fewest bytes, a network may be slower; then memory.
    quickest = min(p.seconds for p in fit)
    alike = [p for p in fit if p.seconds <= 1.01 * quickest]
    best = min(alike, key=lambda p: (p.bytes_sent, p.memory_bytes))
    if len(best.ranks) < world <= WHOLE_RING:
        best = trials.predicted(*made[found.index(best)], backward, sample=False)
    considered = [
        Candidate(p.schedule, p.seconds, p.exposed_s, p.memory_bytes, p.bytes_sent) for p in fit
    ]
    considered.sort(key=lambda candidate: candidate.seconds)
    return dataclasses.replace(best, candidates=tuple(considered))


def _degrees(shapes: Shapes, layout: Layout, keys: Layout) -> list[int]:
    """The Ulysses degrees that heads and ranks allow, and whose groups' shards merge."""
    most = gcd(shapes.kv_heads, layout.world_size)
    degrees = [n for n in range(1, most + 1) if most % n == 0]
    return [n for n in degrees if n == 1 or (merges(layout, n) and merges(keys, n))]


def _schedules(
    world: int, nodes: int, ulysses: int, generator: str, resident: int
) -> list[Schedule]:
    """The schedules to try, without what travels; nodes: the machine's ranks per node, or 1."""
    dealt = {"ulysses": ulysses} if ulysses > 1 else {}
    ring = world // ulysses
    if generator != "auto":
        per_node = {"ranks_per_node": nodes} if generator == "double" and nodes > 1 else {}
        held = {"resident": resident} if generator == "direct" or resident != 1 else {}
        return [{"generator": generator, **held, **per_node, **dealt}]
    counts = [r for r in (1, 2, 4, 8, 16, 32) if r < ring - 1] + [max(ring - 1, 1)]
    tried = [{"generator": "direct", "resident": r, **dealt} for r in counts]
    if ring > 2:  # of two ranks it is direct
        tried.append({"generator": "chain", **dealt})
    if nodes > ulysses and nodes % ulysses == 0:
        tried.append({"generator": "double", "ranks_per_node": nodes, **dealt})
    return tried


def _travellers(generator: str, traveller: str | Travellers, backward: bool) -> list[Travellers]:
    """What may travel with a generator."""
    both = travellers_of(traveller, "direct")  # what is not for the generator, ``plan`` refuses
    if both is not None:
        return [both]
    if generator != "direct":
        return [("kv", "kv")]
    return list(product(("kv", "q"), ("kv", "q") if backward else ("kv",)))


@dataclass
class _Phase:
    """A direction of a schedule; bytes per rank that was simulated."""

    timelines: list[Timeline]
    memory: list[int]
    ring: list[int]


@dataclass
class _Trials:
    """Schedules of one problem. A direction is simulated once, whatever travels in the other."""

    mask: Mask
    layout: Layout
    k_layout: Layout
    shapes: Shapes
    machine: Machine
    plans: dict[str, list[Plan]] = field(default_factory=dict)
    phases: dict[str, _Phase] = field(default_factory=dict)

    def predicted(
        self, schedule: Schedule, traveller: Travellers, backward: bool, sample: bool
    ) -> Prediction:
        """Of all ranks, or of a sample."""
        world = self.layout.world_size
        ranks = list(range(world))
        if sample or world > WHOLE_RING:
            count = SAMPLED if world <= 512 else SAMPLED // 2
            ranks = sorted({i * (world - 1) // (count - 1) for i in range(count)})
        phases = [
            self._phase(schedule, traveller[back], bool(back), ranks)
            for back in range(1 + backward)
        ]
        named = {"traveller": traveller} if "q" in traveller else {}
        return Prediction(
            self.mask,
            self.layout,
            self.k_layout,
            self.shapes,
            self.machine,
            {**schedule, **named},
            phases[0].timelines,
            phases[1].timelines if backward else [],
            [max(memory) for memory in zip(*(phase.memory for phase in phases), strict=True)],
            [max(memory) for memory in zip(*(phase.ring for phase in phases), strict=True)],
        )

    def _phase(
        self, schedule: Schedule, traveller: str, backward: bool, ranks: list[int]
    ) -> _Phase:
        which = repr((schedule, traveller, ranks))
        if which not in self.plans:
            self.plans[which] = [
                make_plan(
                    self.mask, self.layout, self.k_layout, rank, traveller=traveller, **schedule
                )
                for rank in ranks
            ]
        key = f"{which} {backward}"
        if key not in self.phases:
            costs = [Costs(p, self.shapes, self.machine, backward) for p in self.plans[which]]
            todo = [stages(c) for c in costs]
            buffers = [ring_bytes(c, made) for c, made in zip(costs, todo, strict=True)]
            memory = [c.tensors_bytes() + b for c, b in zip(costs, buffers, strict=True)]
            self.phases[key] = _Phase(simulate(costs, todo), memory, buffers)
        return self.phases[key]
