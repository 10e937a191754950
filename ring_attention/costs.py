# SPDX-License-Identifier: BSD-3-Clause
"""What a step of a plan costs: seconds, bytes on the wire, bytes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .figures import Machine
from .mask_algebra import at_least, refuse
from .plan import Plan
from .steps import Step, Transfer

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Shapes:
    """The tensors of a call, but for the sequence: that is in the layout.

    Args:
        heads, kv_heads: of queries and of keys; heads is a multiple of kv_heads.
        head_dim: of q and k.
        v_head_dim: of v; head_dim by default.
        dtype: "bfloat16", "float16", "float32" or "float64".
        batch: samples.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int = 0
    dtype: str = "bfloat16"
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim", "batch"):
            at_least("Shapes", name, getattr(self, name), 1, "it counts")
        if self.heads % self.kv_heads:
            got = (self.heads, self.kv_heads)
            refuse("Shapes", "heads to be a multiple of kv_heads", got, "as GQA needs")
        if self.dtype not in _BYTES:
            refuse("Shapes", f"a dtype of {sorted(_BYTES)}", repr(self.dtype), "pass one of them")

    @property
    def element_bytes(self) -> int:
        """Of q, k, v and out."""
        return _BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """Of an element of the running state and of gradients under way."""
        return max(4, self.element_bytes)

    @property
    def flops_per_pair(self) -> int:
        """Forward, all heads."""
        return 2 * self.heads * (self.head_dim + self.v_head_dim)

    def kv_bytes(self, rows: int) -> int:
        """K and V of so many rows."""
        return (
            self.batch
            * rows
            * self.kv_heads
            * (self.head_dim + self.v_head_dim)
            * (self.element_bytes)
        )

    def grad_bytes(self, rows: int) -> int:
        """Their gradients, as they are summed and sent."""
        return self.kv_bytes(rows) // self.element_bytes * self.state_bytes


def break_even(shapes: Shapes, machine: Machine, causal: bool = False) -> tuple[float, float]:
    """Tokens per rank from which a hop hides behind the fold of a block: forward and backward.

    A fold takes 4 c^2 H D / F seconds (2.5 times that backward), a hop's message 2 c G D elements
    over W: K/V forward, K/V and fp32 gradients backward; so in 16 bits c >= (G/H) F/W forward and
    1.2 (G/H) F/W backward. Balanced causal masks do half the work per hop: twice the tokens. (The
    first K/V and the last gradients of a backward share the own block as they share the bytes.)

    Example:
        >>> machine = Machine("H100", "400G")
        >>> [round(c) for c in break_even(Shapes(32, 8, 128), machine)]
        [3522, 3652]
    """
    device, link = machine.device, machine.link
    work = shapes.batch * shapes.flops_per_pair * (0.5 if causal else 1.0)
    forward = shapes.kv_bytes(1) * device.rate(shapes.dtype, False)
    backward = (shapes.kv_bytes(1) + shapes.grad_bytes(1)) * device.rate(shapes.dtype, True)
    return forward / (work * link.bytes_per_s), backward / (2.5 * work * link.bytes_per_s)


@dataclass(frozen=True)
class Costs:
    """Of one rank's plan, in one phase."""

    plan: Plan
    shapes: Shapes
    machine: Machine
    backward: bool

    @cached_property
    def held_rows(self) -> dict[int, int]:
        """Rows of every block that the rank holds at some time, by origin."""
        return self.plan.held_rows

    @cached_property
    def last_part(self) -> float:
        """The share of the own block's pairs that the backward folds last; see Plan.own_split."""
        first, last = self.plan.backward_steps[0], self.plan.backward_steps[-1]
        kv = self.shapes.kv_bytes(max(first.rows, sum(t.num_rows for t in first.recvs)))
        grad = self.shapes.grad_bytes(max(last.grad_rows, sum(t.num_rows for t in last.grad_recvs)))
        return grad / (kv + grad) if grad else 0.0

    def fold_s(self, step: Step, own_part: float = 0.0) -> float:
        """Seconds of the kernel calls of a step, without `own_part` of its pairs."""
        shapes, device = self.shapes, self.machine.device
        if not step.folds:
            return 0.0
        samples = shapes.batch if self.plan.mask.batch == 1 else 1
        pairs = (step.flops - own_part) * samples
        flops = shapes.flops_per_pair * pairs * (2.5 if self.backward else 1.0)
        # The state (dq in the backward) is read and written by every launch.
        width = shapes.head_dim if self.backward else shapes.v_head_dim
        rows = self.plan.q_layout.sizes[self.plan.rank]
        carried = 2 * shapes.batch * shapes.heads * rows * width * shapes.state_bytes
        launches = [step.folds]
        if self.backward and self.plan.rank in step.folds and len(step.folds) > 1:
            launches = [(self.plan.rank,), step.folds[1:]]
        each = device.launch_s + carried / device.memory_bytes_per_s
        return flops / device.rate(shapes.dtype, self.backward) + len(launches) * each

    def message_bytes(self, transfer: Transfer, gradient: bool) -> int:
        """On the wire."""
        rows = transfer.num_rows
        return self.shapes.grad_bytes(rows) if gradient else self.shapes.kv_bytes(rows)

    def pack_s(self, transfers: Sequence[tuple[Transfer, bool]]) -> float:
        """Reading and writing the rows that have to be packed before they are sent."""
        packed = sum(self.message_bytes(t, gradient) for t, gradient in transfers if self.packs(t))
        return 2 * packed / self.machine.device.memory_bytes_per_s

    def packs(self, transfer: Transfer) -> bool:
        """Whether a message is copied first: own rows are, and parts of a block as held."""
        own = transfer.origin == self.plan.rank
        return own or transfer.num_rows != self.held_rows[transfer.origin]

    def tensors_bytes(self) -> int:
        """What a rank holds whatever the ring does: inputs, outputs, state or gradients."""
        shapes, rank = self.shapes, self.plan.rank
        q = shapes.batch * shapes.heads * self.plan.q_layout.sizes[rank]
        kv = shapes.kv_bytes(self.plan.k_layout.sizes[rank])
        d, dv = shapes.head_dim, shapes.v_head_dim
        element, state = shapes.element_bytes, shapes.state_bytes
        if self.backward:  # q, dq, out, dout; k, v, dk, dv; dq and dk, dv as summed; lse, delta
            own = shapes.grad_bytes(self.plan.k_layout.sizes[rank])
            return q * (2 * d + 2 * dv) * element + 2 * kv + q * d * state + own + 2 * q * state
        launches = sum(bool(step.folds) for step in self.plan.steps)
        carried = q * (dv + 2) * state if launches > 1 else 0
        return q * (d + dv) * element + kv + q * state + carried
