# SPDX-License-Identifier: BSD-3-Clause
"""A plan as the ring loop (loop.py) runs it: stages of posting, folding and waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .costs import Costs
from .steps import Step, Transfer, last_due

# What both sides of a message know it by: kind, hop, origin, sender, receiver.
Key = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Letter:
    """One side of a message.

    Attributes:
        transfer: what the plan says of it; None for heads that Ulysses deals.
        home: whether it carries results to the owner of the rows.
        due: it is complete before the first stage with a larger number.
    """

    transfer: Transfer | None
    home: bool
    sending: bool
    nbytes: int
    due: int
    key: Key

    @property
    def peer(self) -> int:
        """The rank on the other side, among all."""
        _, _, _, sender, receiver = self.key
        return receiver if self.sending else sender


@dataclass
class Stage:
    """What happens between two waits.

    Attributes:
        number, following: of this stage and the next one: what is due before it is waited for.
        step: of the plan; None after the last one, and for Ulysses.
        letters: in the order in which they are posted.
        pack_s, fold_s: seconds of packing, and of the folds with what the transport takes of them.
        stolen_s: that part of fold_s.
    """

    number: int
    following: int
    step: Step | None = None
    letters: list[Letter] = field(default_factory=list)
    pack_s: float = 0.0
    fold_s: float = 0.0
    stolen_s: float = 0.0


def stages(costs: Costs) -> list[Stage]:
    """The stages of a phase of one rank."""
    around = list(_ring(costs))
    if costs.plan.ulysses == 1:
        return around
    last = max([around[-1].following - 1, *(x.due for stage in around for x in stage.letters)])
    return [_heads(costs, -1, to_ring=True), *around, _heads(costs, last + 1, to_ring=False)]


def _ring(costs: Costs) -> Iterator[Stage]:
    """As loop.forward or, where results go home, loop.send_home runs the steps."""
    steps, own = costs.steps, costs.ring.rank
    numbers = [step.number for step in steps]
    previous: Step | None = None
    own_pairs = 0.0
    for step, following in zip(steps, [*numbers[1:], numbers[-1] + 1], strict=True):
        stage = Stage(step.number, following, step)
        _post(stage, costs, step, previous if costs.sends_home else None)
        later = 0.0
        if costs.sends_home and own in step.folds:  # a part of the own block is folded last
            own_pairs = step.flops / len(step.folds)
            later = own_pairs * costs.last_part
        stage.fold_s += costs.fold_s(step, later)
        yield stage
        previous = step
    if costs.sends_home:
        stage = Stage(numbers[-1] + 1, last_due(steps) + 1)
        _post(stage, costs, None, previous)
        if own_pairs:
            first = next(step for step in steps if own in step.folds)
            stage.fold_s += costs.fold_s(first, first.flops - own_pairs * costs.last_part)
        yield stage


def _post(stage: Stage, costs: Costs, step: Step | None, previous: Step | None) -> None:
    listed = []
    if step is not None:
        listed += [(t, False, True) for t in step.sends] + [(t, False, False) for t in step.recvs]
    if previous is not None:
        listed += [(t, True, True) for t in previous.grad_sends]
        listed += [(t, True, False) for t in previous.grad_recvs]
    listed.sort(key=lambda entry: 2 * entry[0].hop + (3 if entry[1] else 0))
    for t, home, sending in listed:
        me, peer = costs.plan.rank, costs.rank_of(t.peer)
        ends = (me, peer) if sending else (peer, me)
        due = max(t.due, stage.following - 1)
        key = ("home" if home else "out", t.hop, t.origin, *ends)
        stage.letters.append(Letter(t, home, sending, costs.message_bytes(t, home), due, key))
    stage.pack_s = costs.pack_s([(t, home) for t, home, sending in listed if sending])
    _steal(stage, costs)


def _steal(stage: Stage, costs: Costs) -> None:
    moved = sum(letter.nbytes for letter in stage.letters)
    stage.stolen_s = moved * costs.machine.device.cpu_s_per_byte
    stage.fold_s = stage.stolen_s


def _heads(costs: Costs, number: int, to_ring: bool) -> Stage:
    """An all-to-all in a Ulysses group, which nothing hides; see ulysses.py.

    Forward, q, k and v go to the ring, out and lse come back; backward, dout and dlse go, dq, dk
    and dv come.
    """
    plan, shapes = costs.plan, costs.share
    qkv = to_ring != costs.backward

    def nbytes(rank: int) -> int:
        """Of one share of the heads of that rank's rows."""
        queries, keys = plan.q_layout.sizes[rank], plan.k_layout.sizes[rank]
        if qkv:
            return shapes.query_bytes(queries, shapes.head_dim) + shapes.kv_bytes(keys)
        return shapes.query_bytes(queries, shapes.v_head_dim, 1)

    stage = Stage(number, number + 1)
    me = plan.rank
    first = me - me % plan.ulysses
    for peer in range(first, first + plan.ulysses):
        if peer == me:
            continue
        for sending, ends in ((True, (me, peer)), (False, (peer, me))):
            # To the ring a rank sends its own rows; from it, each gets back those it had.
            rows_of = ends[0] if to_ring else ends[1]
            if size := nbytes(rows_of):
                key = ("heads", number, rows_of, *ends)
                stage.letters.append(Letter(None, False, sending, size, number, key))
    # Packed before, put in place after; the own share too.
    moved = sum(letter.nbytes for letter in stage.letters) + nbytes(me)
    stage.pack_s = 2 * moved / costs.machine.device.memory_bytes_per_s
    _steal(stage, costs)
    return stage


def ring_bytes(costs: Costs, made: Sequence[Stage]) -> int:
    """The most bytes that message buffers take at one time: blocks, packed rows, results."""
    held: dict[int, int] = {}  # bytes of received blocks by origin
    sums: dict[int, int] = {}  # and of the sums of their results
    posted: list[tuple[int, int]] = []  # due, bytes: free once complete
    arriving: list[tuple[int, int, int]] = []  # due, bytes, origin
    peak = 0

    def watch() -> None:
        nonlocal peak
        now = sum(held.values()) + sum(sums.values())
        now += sum(size for _, size in posted) + sum(size for _, size, _ in arriving)
        peak = max(peak, now)

    def sum_of(origin: int) -> None:
        # Sums of tiles are no message buffers: they are counted in Costs.tensors_bytes.
        if origin != costs.ring.rank and costs.ring.tiles is None:
            sums.setdefault(origin, costs.home_bytes(costs.held_rows[origin]))

    for stage in made:
        for letter in stage.letters:
            t = letter.transfer
            if t is None:
                posted.append((letter.due, letter.nbytes))
            elif not letter.sending and letter.home:
                arriving.append((letter.due, letter.nbytes, t.origin))
            elif not letter.sending:
                held[t.origin] = letter.nbytes
            elif letter.home:
                size = sums.pop(t.origin, 0)
                posted.append((letter.due, size + (letter.nbytes if size != letter.nbytes else 0)))
            elif costs.packs(t):
                posted.append((letter.due, letter.nbytes))
        for origin in stage.step.folds if stage.step and costs.sends_home else ():
            sum_of(origin)
        watch()
        posted = [entry for entry in posted if entry[0] >= stage.following]
        for due, _, origin in arriving:
            if due < stage.following:
                sum_of(origin)
        watch()
        arriving = [entry for entry in arriving if entry[0] >= stage.following]
        for origin in stage.step.release if stage.step else ():
            held.pop(origin, None)
    return peak
