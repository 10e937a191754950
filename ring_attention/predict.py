# SPDX-License-Identifier: BSD-3-Clause
"""Predictions: what a schedule takes on given hardware, before anything is rented or run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .costs import Costs, Shapes, break_even
from .figures import Machine
from .layout import Layout
from .mask_algebra import Mask, refuse
from .plan import Plan, plan
from .simulate import Timeline, simulate
from .stages import ring_bytes

# Rings up to this size are simulated whole; of larger ones this many ranks (half of it above 512).
WHOLE_RING, SAMPLED = 64, 8


@dataclass(frozen=True)
class Prediction:
    """What a schedule takes. Predicted, never measured; see Note [simulation] in simulate.py.

    Attributes:
        mask, layout, shapes, machine: what it was made for.
        schedule: the arguments of ``plan`` that choose it: generator, resident, ranks_per_node.
        forward, backward: per simulated rank; backward is empty without it.
        memory: bytes per simulated rank: tensors, state, gradients and the ring's buffers.
        ring_memory: those of the ring's buffers alone.
    """

    mask: Mask
    layout: Layout
    shapes: Shapes
    machine: Machine
    schedule: dict[str, Any]
    forward: list[Timeline] = field(repr=False)
    backward: list[Timeline] = field(repr=False)
    memory: list[int] = field(repr=False)
    ring_memory: list[int] = field(repr=False)

    @property
    def ranks(self) -> list[int]:
        """The ranks that were simulated: all of a small ring."""
        return [timeline.rank for timeline in self.forward]

    @property
    def seconds(self) -> float:
        """Of the slowest rank, forward and backward."""
        return sum(max(t.seconds for t in phase) for phase in self._phases)

    @property
    def exposed_s(self) -> float:
        """Waiting for messages, of the rank that waits longest."""
        return max(map(sum, zip(*([t.wait_s for t in p] for p in self._phases), strict=True)))

    @property
    def memory_bytes(self) -> int:
        """Of the fullest rank."""
        return max(self.memory)

    @property
    def bytes_sent(self) -> int:
        """By the rank that sends most."""
        return max(map(sum, zip(*([t.sent_bytes for t in p] for p in self._phases), strict=True)))

    @property
    def imbalance(self) -> float:
        """The most computing of a rank over the mean."""
        work = [sum(t) for t in zip(*([t.compute_s for t in p] for p in self._phases), strict=True)]
        return max(work) * len(work) / sum(work) if sum(work) else 1.0

    @property
    def _phases(self) -> list[list[Timeline]]:
        return [phase for phase in (self.forward, self.backward) if phase]

    def explain(self) -> str:
        """All of it as text, for people."""
        layout, shapes, world = self.layout, self.shapes, self.layout.world_size
        who = "every rank" if len(self.ranks) == world else f"ranks {self.ranks}, in step"
        how = ", ".join(f"{name}={value}" for name, value in self.schedule.items())
        causal = self.imbalance < 1.1 and _half(self.mask)
        even = break_even(shapes, self.machine, causal)
        tokens = sorted(layout.sizes)
        lines = [
            f"{self.mask!r} over {layout.length:,} tokens on {world} ranks, "
            f"{type(layout).__name__}",
            f"  {shapes.heads} heads, {shapes.kv_heads} K/V heads of {shapes.head_dim}, "
            f"{shapes.dtype}, batch {shapes.batch}; {self.machine}",
            f"  schedule: {how}",
            f"  predicted by a simulation of {who}:",
            "",
            "             time    compute   exposed   packing      sent  received",
        ]
        for name, phase in (("forward", self.forward), ("backward", self.backward)):
            if phase:
                cells = [
                    _time(max(t.seconds for t in phase)),
                    _time(max(t.compute_s for t in phase)),
                    f"{100 * max(t.wait_s / max(t.seconds, 1e-12) for t in phase):.1f}%",
                    _time(max(t.post_s for t in phase)),
                    _bytes(max(t.sent_bytes for t in phase)),
                    _bytes(max(t.received_bytes for t in phase)),
                ]
                lines.append(f"  {name:8}" + "".join(f"{cell:>10}" for cell in cells))
        lines += [
            "",
            f"  memory per rank: {_bytes(self.memory_bytes)}, of which the ring's buffers "
            f"{_bytes(max(self.ring_memory))} (attention alone: no weights, no other activations)",
            f"  compute: {self.imbalance:.3f} times the mean at most; tokens per rank: "
            f"{tokens[0]:,} to {tokens[-1]:,}",
            f"  a hop over {self.machine.link.name} hides from {even[0]:,.0f} tokens per rank on "
            f"in the forward, from {even[1]:,.0f} in the backward"
            f"{' (causal)' if causal else ' (full blocks)'}",
        ]
        if stolen := max(t.stolen_s for p in self._phases for t in p):
            lines.append(f"  the transport takes up to {_time(stolen)} of a phase from the kernels")
        return "\n".join(lines)

    def draw(self, path: Any) -> None:
        """Draws ranks x time, .png, .svg or .pdf; needs matplotlib."""
        from .picture import draw

        draw(self, path)


def _half(mask: Mask) -> bool:
    return mask.to_dict() == {"mask": "Causal", "bottom_right": False}


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e3 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} us"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def predict(
    mask: Mask,
    layout: Layout,
    shapes: Shapes,
    machine: Machine,
    *,
    generator: str = "auto",
    resident: int = 1,
    memory_bytes: float | None = None,
    backward: bool = True,
) -> Prediction:
    """Predicts a schedule on hardware, or finds the quickest one that fits into memory.

    The schedules of all ranks are made and their steps simulated (of more than 64 ranks: of a few).
    Nothing is allocated: ten million tokens on 4,096 ranks take seconds.

    Args:
        mask, layout: as in ``plan``.
        shapes: heads, head dimensions, dtype, batch.
        machine: figures of device and links.
        generator: as in ``plan``; "auto" tries chain, direct with several numbers of resident
            blocks, and double where the machine has nodes.
        resident: for a generator that is named.
        memory_bytes: what attention may take of a rank's memory; the device's by default.
        backward: forward and backward, or forward only.

    Raises:
        ValueError: nothing fits into memory, or arguments that do not fit together.

    Example:
        >>> from ring_attention import Causal, Machine, Shapes, Zigzag
        >>> p = predict(Causal(), Zigzag(1 << 20, 8), Shapes(32, 8, 128), Machine("H100", "400G"))
        >>> p.schedule["generator"], p.exposed_s < 0.001 * p.seconds
        ('direct', True)
    """
    world = layout.world_size
    limit = machine.device.memory_bytes if memory_bytes is None else memory_bytes
    nodes = machine.ranks_per_node if world % machine.ranks_per_node == 0 else 1
    per_node = {"ranks_per_node": nodes} if nodes > 1 else {}
    if generator == "auto":
        counts = [r for r in (1, 2, 4, 8, 16, 32) if r < world - 1] + [max(world - 1, 1)]
        tried = [{"generator": "direct", "resident": r} for r in counts]
        tried.append({"generator": "chain"})
        if nodes > 1:
            tried.append({"generator": "double", **per_node})
    else:
        inner = per_node if generator == "double" else {}
        tried = [{"generator": generator, "resident": resident, **inner}]
    made: list[Prediction] = []
    for schedule in tried:
        sample = world > SAMPLED and len(tried) > 1
        made.append(_predict(mask, layout, shapes, machine, schedule, backward, sample))
    fit = [p for p in made if p.memory_bytes <= limit]
    if not fit:
        least = min(made, key=lambda p: p.memory_bytes)
        refuse(
            "predict",
            f"a schedule within {_bytes(limit)} per rank",
            f"{_bytes(least.memory_bytes)} for {least.schedule} at least",
            "use more ranks, or raise memory_bytes",
        )
    # Alike within a part in a hundred: the first, which is the one with less memory.
    quickest = min(p.seconds for p in fit)
    best = next(p for p in fit if p.seconds <= 1.01 * quickest)
    if len(best.ranks) < world <= WHOLE_RING:
        best = _predict(mask, layout, shapes, machine, best.schedule, backward, False)
    return best


def _predict(
    mask: Mask,
    layout: Layout,
    shapes: Shapes,
    machine: Machine,
    schedule: dict[str, Any],
    backward: bool,
    sample: bool,
) -> Prediction:
    world = layout.world_size
    ranks = list(range(world))
    if sample or world > WHOLE_RING:
        count = SAMPLED if world <= 512 else SAMPLED // 2
        ranks = sorted({i * (world - 1) // (count - 1) for i in range(count)})
    plans: list[Plan] = [plan(mask, layout, rank=rank, **schedule) for rank in ranks]
    phases = []
    memory = [0] * len(plans)
    ring = [0] * len(plans)
    for back in (False, True) if backward else (False,):
        costs = [Costs(p, shapes, machine, back) for p in plans]
        phases.append(simulate(costs))
        buffers = [ring_bytes(c) for c in costs]
        ring = list(map(max, ring, buffers))
        memory = [
            max(m, c.tensors_bytes() + b) for m, c, b in zip(memory, costs, buffers, strict=True)
        ]
    return Prediction(
        mask, layout, shapes, machine, schedule, phases[0], [*phases, []][1], memory, ring
    )
