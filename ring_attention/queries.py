# SPDX-License-Identifier: BSD-3-Clause
"""The ring with queries that travel, and keys that stay.

Forward, a rank folds its own keys for the queries of others and sends their states (acc, m, l) home
in fp32, where they are combined: little to send for few queries over a long cache. Backward, Q, dO,
lse and delta travel and dQ goes home, while dK and dV are summed where their keys are: two thirds
of the bytes of K/V and dK/dV for as many heads of keys as of queries.
"""

from collections.abc import Sequence

from torch import Tensor

from . import ops
from .loop import Keys, send_home
from .messages import Blocks, Rows, States, Sums
from .rank_plan import Plan
from .ring import Transport


def forward(
    plan: Plan,
    transport: Transport,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As loop.forward."""
    acc, m, l = ops.empty_state(q, v)  # noqa: E741
    blocks = Blocks(transport, "Q", Rows((q,)))
    states = States(transport, "state", Rows((acc, m, l)))

    def add_to(
        state: Sequence[Tensor],
        rows: Tensor,
        keys: Sequence[tuple[Tensor, Tensor]],
        sinks: Tensor | None = None,
    ) -> None:
        """Folds the own keys, seen at these intervals; none for the state before any key."""
        acc, m, l = state  # noqa: E741
        ops.fold_(
            rows,
            [k for _ in keys],
            [v for _ in keys],
            [begin for begin, _ in keys],
            [end for _, end in keys],
            sinks,
            acc,
            m,
            l,
            None,
            None,
            first=not keys,
            last=False,
            scale=scale,
            softcap=softcap,
        )

    def fold(origins: Sequence[int], keys: Keys) -> None:
        for origin in origins:
            (rows,) = blocks[origin].tensors
            state = states.of(origin, blocks[origin].rows).tensors
            add_to(state, rows, [plan.query_intervals(origin, q.device, keys)])

    add_to((acc, m, l), q, [], sinks)  # sinks count once: at the owner of the queries
    held = plan.held_query_rows
    send_home(plan, plan.steps, held, transport, "forward", blocks, states, fold)
    out, lse = ops.empty_output(q, v)
    ops.finish_(acc, m, l, out, lse)
    return out, lse


def add_gradients(
    plan: Plan,
    transport: Transport,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    scale: float,
    softcap: float,
) -> None:
    """As loop.add_gradients; dQ goes home."""
    dq, dk, dv = into
    blocks = Blocks(transport, "Q", Rows((q, dout, lse, delta)))
    sums = Sums(transport, "dQ", Rows((dq,)))

    def fold(origins: Sequence[int], keys: Keys) -> None:
        for origin in origins:
            begin, end = plan.query_intervals(origin, k.device, keys)
            (into,) = sums.of(origin, blocks[origin].rows).tensors
            q, dout, lse, delta = blocks[origin].tensors
            ops.fold_backward_(
                q,
                dout,
                lse,
                delta,
                [k],
                [v],
                [begin],
                [end],
                into,
                [dk],
                [dv],
                scale=scale,
                softcap=softcap,
            )

    held = plan.held_query_rows
    send_home(plan, plan.backward_steps, held, transport, "backward", blocks, sums, fold)
