# SPDX-License-Identifier: BSD-3-Clause
"""What a step of a plan costs: seconds, bytes on the wire, bytes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from . import pending
from .figures import Machine
from .rank_plan import Plan
from .shapes import Shapes
from .steps import Step, Transfer


def break_even(
    shapes: Shapes,
    machine: Machine,
    causal: bool = False,
    traveller: tuple[str, str] = ("kv", "kv"),
) -> tuple[float, float]:
    """Tokens per rank from which a hop hides behind the fold of a block: forward and backward.

    A fold takes 4 c^2 H D / F seconds (2.5 times that backward), a hop's message 2 c G D elements
    over W: K/V forward, K/V and fp32 gradients backward; so in 16 bits c >= (G/H) F/W forward and
    1.2 (G/H) F/W backward. Balanced causal masks do half the work per hop: twice the tokens. (The
    first K/V and the last gradients of a backward share the own block as they share the bytes.)
    What the transport takes from the kernels for a byte sent and one received hides as much of 1/W.
    Tokens are those of what stays: of queries if K/V travel, of keys if queries do.

    Example:
        >>> machine = Machine("H100", "400G")
        >>> [round(c) for c in break_even(Shapes(32, 8, 128), machine)]
        [3522, 3652]
    """
    device, link = machine.device, machine.link
    work = shapes.batch * shapes.flops_per_pair * (0.5 if causal else 1.0)

    def tokens(what: str, backward: bool) -> float:
        moved = shapes.block_bytes(what, backward, 1) + shapes.home_bytes(what, backward, 1)
        rate = device.rate(shapes.dtype, backward) / (2.5 if backward else 1.0)
        over_s = max(0.0, 1 / link.bytes_per_s - 2 * device.cpu_s_per_byte)
        return moved * over_s * rate / work

    return tokens(traveller[0], False), tokens(traveller[1], True)


@dataclass(frozen=True)
class Costs:
    """Of one rank's plan, in one phase.

    With Ulysses the ring's plan, layouts and shapes are those of the rank's share of the heads.
    """

    plan: Plan
    shapes: Shapes
    machine: Machine
    backward: bool

    @cached_property
    def ring(self) -> Plan:
        """The plan of this rank's ring: the plan itself, but for Ulysses."""
        return self.plan.ring or self.plan

    @cached_property
    def share(self) -> Shapes:
        """The tensors that go around that ring."""
        return self.shapes.share(self.plan.ulysses)

    def rank_of(self, ring_rank: int) -> int:
        """A ring's rank among all."""
        return ring_rank * self.plan.ulysses + self.plan.rank % self.plan.ulysses

    @property
    def traveller(self) -> str:
        """What travels in this phase."""
        return self.plan.traveller[self.backward]

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of this phase."""
        return self.ring.backward_steps if self.backward else self.ring.steps

    @property
    def sends_home(self) -> bool:
        """Whether folds have results for others: all but those of K/V that travel forward."""
        return self.backward or self.traveller == "q"

    @cached_property
    def held_rows(self) -> dict[int, int]:
        """Rows of every block that the rank holds at some time, by origin."""
        return self.ring.held_query_rows if self.traveller == "q" else self.ring.held_rows

    @cached_property
    def last_part(self) -> float:
        """The share of the own block's pairs that are folded last; see Plan.own_split."""
        first, last = self.steps[0], self.steps[-1]
        out = self.block_bytes(max(first.rows, sum(t.num_rows for t in first.recvs)))
        home = self.home_bytes(max(last.grad_rows, sum(t.num_rows for t in last.grad_recvs)))
        return home / (out + home) if home else 0.0

    def block_bytes(self, rows: int) -> int:
        """Of so many rows of what travels."""
        return rows * self._each[0]

    def home_bytes(self, rows: int) -> int:
        """Of what comes home for them."""
        return rows * self._each[1]

    @cached_property
    def _each(self) -> tuple[int, int]:
        shapes, what = self.share, self.traveller
        return shapes.block_bytes(what, self.backward, 1), shapes.home_bytes(what, self.backward, 1)

    def fold_s(self, step: Step, own_part: float = 0.0) -> float:
        """Seconds of the kernel calls of a step, without `own_part` of its pairs."""
        shapes, device = self.share, self.machine.device
        if not step.folds:
            return 0.0
        samples = shapes.batch if self.plan.mask.batch == 1 else 1
        pairs = (step.flops - own_part) * samples
        flops = shapes.flops_per_pair * pairs * (2.5 if self.backward else 1.0)
        seconds = flops / device.rate(shapes.dtype, self.backward)
        launches = self._carried_bytes(step)
        overhead = sum(device.launch_s + 2 * x / device.memory_bytes_per_s for x in launches)
        if self.ring.tiles is not None:  # a launch per pair of tiles, in either part of a step
            overhead *= 1.0 - own_part / step.flops
        return seconds + overhead

    def _carried_bytes(self, step: Step) -> list[int]:
        """What every launch of a step reads and writes beside its blocks: sums that stay, states.

        K/V blocks share a launch, but for the own one of a backward; queries have one each.
        """
        shapes, ring = self.share, self.ring
        if (tiles := ring.tiles) is not None:
            keys = [j for origin in step.folds for j in ring.places(origin)]
            # A state is written, two are read to write one; sums are cleared and added to first.
            state, dq, dkv = self._tile_bytes
            carried = 3 * (dq + dkv) if self.backward else 2 * state
            return [carried] * len(tiles.to_fold(ring.rank, keys))
        if self.traveller == "q":
            if self.backward:
                return [shapes.grad_bytes(ring.k_layout.sizes[ring.rank])] * len(step.folds)
            return [self.home_bytes(self.held_rows[origin]) for origin in step.folds]
        width = shapes.head_dim if self.backward else shapes.v_head_dim
        carried = shapes.query_bytes(ring.q_layout.sizes[ring.rank], 0, width)
        alone = self.backward and ring.rank in step.folds and len(step.folds) > 1
        return [carried] * (2 if alone else 1)

    @cached_property
    def _tile_bytes(self) -> tuple[int, int, int]:
        """With tiles: of a state, dQ and dK/dV of one."""
        tiles, shapes = self.ring.tiles, self.share
        assert tiles is not None
        state = shapes.query_bytes(tiles.q_rows, 0, shapes.v_head_dim + 2)
        dq = shapes.query_bytes(tiles.q_rows, 0, shapes.head_dim)
        return state, dq, shapes.grad_bytes(tiles.k_rows)

    def _waiting_bytes(self) -> int:
        """With tiles: what waits in their trees, at most."""
        state, dq, dkv = self._tile_bytes
        if not self.backward:
            return pending.states(self.ring) * state
        split = self.ring.own_split(self.block_bytes(1), self.home_bytes(1), self.steps)
        dqs, dkvs = pending.sums(self.ring, split)
        return dqs * dq + dkvs * dkv

    def message_bytes(self, transfer: Transfer, home: bool) -> int:
        """On the wire."""
        return (self.home_bytes if home else self.block_bytes)(transfer.num_rows)

    def pack_s(self, transfers: Sequence[tuple[Transfer, bool]]) -> float:
        """Reading and writing the rows that have to be packed before they are sent."""
        tiles = self.ring.tiles is not None  # their sums are put into one message
        copied = [(t, home) for t, home in transfers if self.packs(t) or (home and tiles)]
        packed = sum(self.message_bytes(t, home) for t, home in copied)
        return 2 * packed / self.machine.device.memory_bytes_per_s

    def packs(self, transfer: Transfer) -> bool:
        """Whether a message is copied first: own rows are, and parts of a block as held."""
        own = transfer.origin == self.ring.rank
        return own or transfer.num_rows != self.held_rows[transfer.origin]

    def tensors_bytes(self) -> int:
        """What a rank holds whatever the ring does: inputs, outputs, state or gradients."""
        held = self._tensors(self.share, self.ring, ring=True)
        if self.plan.ulysses > 1:  # and its own rows of all heads
            held += self._tensors(self.shapes, self.plan, ring=False)
        return held

    def _tensors(self, shapes: Shapes, plan: Plan, ring: bool) -> int:
        queries, keys = plan.q_layout.sizes[plan.rank], plan.k_layout.sizes[plan.rank]
        d, dv, kv = shapes.head_dim, shapes.v_head_dim, shapes.kv_bytes(keys)
        if self.backward:  # q, dq, out, dout; lse, delta; k, v, dk, dv
            held = shapes.query_bytes(queries, 2 * (d + dv), 2) + 2 * kv
            if plan.tiles is not None:
                return held + self._waiting_bytes()
            summed = shapes.query_bytes(queries, 0, d) + shapes.grad_bytes(keys)
            return held + (summed if ring else 0)
        held = shapes.query_bytes(queries, d + dv, 1) + kv  # q, out; lse; k, v
        if plan.tiles is not None:
            return held + self._waiting_bytes()
        launches = sum(bool(step.folds) for step in self.steps)
        carries = ring and (launches > 1 or self.sends_home)
        return held + (shapes.query_bytes(queries, 0, dv + 2) if carries else 0)
