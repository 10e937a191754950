# SPDX-License-Identifier: BSD-3-Clause
"""What a schedule is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .figures import Machine
from .layout import Layout
from .mask_algebra import Mask
from .shapes import Shapes
from .simulate import Timeline


@dataclass(frozen=True)
class Candidate:
    """A schedule that was considered, and what it would take; see Prediction."""

    schedule: dict[str, Any]
    seconds: float
    exposed_s: float
    memory_bytes: int
    bytes_sent: int


@dataclass(frozen=True)
class Prediction:
    """What a schedule takes. Predicted, never measured; see Note [simulation] in simulate.py.

    Attributes:
        mask, layout, k_layout, shapes, machine: what it was made for; layout is the queries'.
        schedule: the arguments of ``plan`` that choose it: generator, and what else it needs of
            resident, ranks_per_node, ulysses, traveller, invariant.
        forward, backward: per simulated rank; backward is empty without it.
        memory: bytes per simulated rank: tensors, state, gradients and the ring's buffers.
        ring_memory: those of the ring's buffers alone.
        candidates: the schedules among which it was chosen, the quickest first.
    """

    mask: Mask
    layout: Layout
    k_layout: Layout
    shapes: Shapes
    machine: Machine
    schedule: dict[str, Any]
    forward: list[Timeline] = field(repr=False)
    backward: list[Timeline] = field(repr=False)
    memory: list[int] = field(repr=False)
    ring_memory: list[int] = field(repr=False)
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)

    @property
    def traveller(self) -> tuple[str, str]:
        """What travels in the forward and in the backward."""
        forward, backward = self.schedule.get("traveller", ("kv", "kv"))
        return forward, backward

    @property
    def ulysses(self) -> int:
        """The ranks among which heads are dealt."""
        return int(self.schedule.get("ulysses", 1))

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
        from .explain import explain

        return explain(self)

    def draw(self, path: Any) -> None:
        """Draws ranks x time, .png, .svg or .pdf; needs matplotlib."""
        from .picture import draw

        draw(self, path)
