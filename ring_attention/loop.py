# SPDX-License-Identifier: BSD-3-Clause
"""The ring: a short program that runs a plan. It has no cases; the plan has them all.

    for step in plan.steps:
        post the blocks that later steps read        (and the results of the last fold, if they
        fold the blocks that are here                 go home): computing hides what is under way
        wait for what is due before the next step

The order in which ranks post is told in messages.py. Here K/V travel; queries do in queries.py.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from . import ops, trace
from .events import Phase
from .messages import Blocks, Messages, Rows, Sums
from .rank_plan import Plan
from .ring import Transport
from .steps import Step, last_due


def _numbered(steps: Sequence[Step]) -> Iterator[tuple[Step, int]]:
    """The steps, each with the number of the one that follows it."""
    numbers = [step.number for step in steps[1:]]
    yield from zip(steps, [*numbers, steps[-1].number + 1], strict=True)


def around(plan: Plan, transport: Transport, blocks: Blocks, fold: Callable[[Step], None]) -> None:
    """Runs the steps of a forward; `fold` folds the blocks of one that has any."""
    messages = Messages(transport, "forward")
    for step, following in _numbered(plan.steps):
        blocks.exchange(messages, step)
        messages.post(step.number, following)
        if step.folds:
            with trace.begin("compute", "forward", transport, step.number):
                fold(step)
        messages.wait(step.number, following)
        blocks.release(step.release)


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
    """Runs a plan: out [B, H, Sq, Dv] in q's dimension order and lse [B, H, Sq]."""
    out, lse = ops.empty_output(q, v)
    launches = [step.number for step in plan.steps if step.folds]
    # One launch starts and finishes in registers; more carry the state between them.
    acc, m, l = ops.empty_state(q, v) if len(launches) > 1 else (None, None, None)  # noqa: E741

    def fold(origins: Sequence[int], first: bool, last: bool) -> None:
        intervals = [plan.intervals(origin, q.device) for origin in origins]
        ops.fold_(
            q,
            [blocks[origin].tensors[0] for origin in origins],
            [blocks[origin].tensors[1] for origin in origins],
            [key_begin for key_begin, _ in intervals],
            [key_end for _, key_end in intervals],
            sinks if first else None,
            acc,
            m,
            l,
            out if last else None,
            lse if last else None,
            first=first,
            last=last,
            scale=scale,
            softcap=softcap,
        )

    def fold_step(step: Step) -> None:
        fold(step.folds, step.number == launches[0], step.number == launches[-1])

    blocks = Blocks(transport, "K/V", Rows((k, v)))
    around(plan, transport, blocks, fold_step)
    if not launches:  # no row sees a key: out = 0, lse = -inf or the sink
        fold([], first=True, last=True)
    return out, lse


Keys = tuple[int, int] | None  # a range of the own keys, or all


def send_home(
    plan: Plan,
    steps: Sequence[Step],
    held_rows: dict[int, int],
    transport: Transport,
    phase: Phase,
    blocks: Blocks,
    sums: Sums,
    fold: Callable[[Sequence[int], Keys], None],
) -> None:
    """Runs steps whose results go straight home while the next block computes.

    The own keys are folded with the own queries in two parts: one first, to hide the first hop of
    blocks, one last, to hide the last hop of results.

    Args:
        held_rows: rows of every block as held, by origin.
        blocks, sums: what travels, and what goes home.
        fold: adds the results of folding these origins' blocks to their sums.
    """
    messages = Messages(transport, phase)
    own, own_keys = transport.rank, plan.k_layout.sizes[transport.rank]
    split = plan.own_split(blocks.own.nbytes(1), sums.own.nbytes(1), steps)

    def timed(origins: Sequence[int], step: int, keys: Keys) -> None:
        with trace.begin("compute", phase, transport, step):
            fold(origins, keys)

    previous: Step | None = None
    for step, following in _numbered(steps):
        blocks.exchange(messages, step)
        if previous is not None:
            sums.exchange(messages, previous)
        messages.post(step.number, following)
        if own in step.folds and split > 0:
            timed([own], step.number, (0, split))
        if others := [origin for origin in step.folds if origin != own]:
            timed(others, step.number, None)
        messages.wait(step.number, following)
        sums.add_arrived(following, held_rows)
        blocks.release(step.release)
        previous = step
    last = steps[-1]
    sums.exchange(messages, last)
    number, end = last.number + 1, last_due(steps) + 1
    messages.post(number, end)
    if split < own_keys and any(own in step.folds for step in steps):
        timed([own], number, (split, own_keys))
    messages.wait(number, end)
    sums.add_arrived(end, held_rows)


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
    """Runs the K/V plan again, for the gradients: dK/dV go home.

    Args:
        into: dq, dk and dv, as they are summed; see backward.py.
    """
    dq, *own = into
    blocks = Blocks(transport, "K/V", Rows((k, v)))
    sums = Sums(transport, "dK/dV", Rows(tuple(own)))

    def fold(origins: Sequence[int], keys: Keys) -> None:
        intervals = [plan.intervals(origin, q.device, keys) for origin in origins]
        into = [sums.of(origin, blocks[origin].rows).tensors for origin in origins]
        ops.fold_backward_(
            q,
            dout,
            lse,
            delta,
            [blocks[origin].tensors[0] for origin in origins],
            [blocks[origin].tensors[1] for origin in origins],
            [key_begin for key_begin, _ in intervals],
            [key_end for _, key_end in intervals],
            dq,
            [dk for dk, _ in into],
            [dv for _, dv in into],
            scale=scale,
            softcap=softcap,
        )

    steps = plan.backward_steps
    send_home(plan, steps, plan.held_rows, transport, "backward", blocks, sums, fold)
