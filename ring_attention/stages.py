# SPDX-License-Identifier: BSD-3-Clause
"""A plan as the ring loop (loop.py) runs it: stages of posting, folding and waiting."""

from __future__ import annotations

from dataclasses import dataclass, field

from .costs import Costs
from .steps import Step, Transfer, last_due

# What both sides of a message know it by: gradient, hop, origin, sender, receiver.
Key = tuple[bool, int, int, int, int]


@dataclass(frozen=True)
class Letter:
    """One side of a message."""

    transfer: Transfer
    gradient: bool
    sending: bool
    nbytes: int
    due: int  # complete before the first stage with a larger number
    key: Key


@dataclass
class Stage:
    """What happens between two waits.

    Attributes:
        number, following: of this stage and the next one: what is due before it is waited for.
        letters: in the order in which they are posted.
        pack_s, fold_s: seconds of packing, and of the folds with what the transport takes of them.
        stolen_s: that part of fold_s.
    """

    number: int
    following: int
    letters: list[Letter] = field(default_factory=list)
    pack_s: float = 0.0
    fold_s: float = 0.0
    stolen_s: float = 0.0


def stages(costs: Costs) -> list[Stage]:
    """The stages of a phase of one rank."""
    plan = costs.plan
    numbers = [step.number for step in plan.steps]
    ends = [*numbers[1:], numbers[-1] + 1]
    out = []
    previous: Step | None = None
    own_pairs = 0.0
    for step, following in zip(plan.steps, ends, strict=True):
        stage = Stage(step.number, following)
        _post(stage, costs, step, previous if costs.backward else None)
        later = 0.0
        if costs.backward and plan.rank in step.folds:  # a part of the own block is folded last
            own_pairs = step.flops / len(step.folds)
            later = own_pairs * costs.last_part
        stage.fold_s += costs.fold_s(step, later)
        out.append(stage)
        previous = step
    if costs.backward:
        stage = Stage(numbers[-1] + 1, last_due(plan.steps) + 1)
        _post(stage, costs, None, previous)
        if own_pairs:
            first = next(step for step in plan.steps if plan.rank in step.folds)
            stage.fold_s += costs.fold_s(first, first.flops - own_pairs * costs.last_part)
        out.append(stage)
    return out


def _post(stage: Stage, costs: Costs, step: Step | None, previous: Step | None) -> None:
    listed = []
    if step is not None:
        listed += [(t, False, True) for t in step.sends] + [(t, False, False) for t in step.recvs]
    if previous is not None:
        listed += [(t, True, True) for t in previous.grad_sends]
        listed += [(t, True, False) for t in previous.grad_recvs]
    listed.sort(key=lambda entry: 2 * entry[0].hop + (3 if entry[1] else 0))
    rank = costs.plan.rank
    for t, gradient, sending in listed:
        ends = (rank, t.peer) if sending else (t.peer, rank)
        due = max(t.due, stage.following - 1)
        nbytes = costs.message_bytes(t, gradient)
        stage.letters.append(
            Letter(t, gradient, sending, nbytes, due, (gradient, t.hop, t.origin, *ends))
        )
    stage.pack_s = costs.pack_s([(t, gradient) for t, gradient, sending in listed if sending])
    moved = sum(letter.nbytes for letter in stage.letters)
    stage.stolen_s = moved * costs.machine.device.cpu_s_per_byte
    stage.fold_s = stage.stolen_s


def ring_bytes(costs: Costs) -> int:
    """The most bytes that the ring's buffers take at one time: blocks, packed rows, gradients."""
    plan = costs.plan
    held: dict[int, int] = {}  # bytes of received blocks by origin
    sums: dict[int, int] = {}  # and of the sums of their gradients
    posted: list[tuple[int, int]] = []  # due, bytes: free once complete
    arriving: list[tuple[int, int, int]] = []  # due, bytes, origin
    peak = 0

    def watch() -> None:
        nonlocal peak
        now = sum(held.values()) + sum(sums.values())
        now += sum(size for _, size in posted) + sum(size for _, size, _ in arriving)
        peak = max(peak, now)

    def sum_of(origin: int) -> None:
        if origin != plan.rank:
            sums.setdefault(origin, costs.shapes.grad_bytes(costs.held_rows[origin]))

    steps: list[Step | None] = [*plan.steps, *([None] if costs.backward else [])]
    for stage, step in zip(stages(costs), steps, strict=True):
        for letter in stage.letters:
            t = letter.transfer
            if not letter.sending and letter.gradient:
                arriving.append((letter.due, letter.nbytes, t.origin))
            elif not letter.sending:
                held[t.origin] = letter.nbytes
            elif letter.gradient:
                size = sums.pop(t.origin)
                posted.append((letter.due, size + (letter.nbytes if size != letter.nbytes else 0)))
            elif costs.packs(t):
                posted.append((letter.due, letter.nbytes))
        for origin in step.folds if step and costs.backward else ():
            sum_of(origin)
        watch()
        posted = [entry for entry in posted if entry[0] >= stage.following]
        for due, _, origin in arriving:
            if due < stage.following:
                sum_of(origin)
        watch()
        arriving = [entry for entry in arriving if entry[0] >= stage.following]
        for origin in step.release if step else ():
            held.pop(origin, None)
    return peak
