# SPDX-License-Identifier: BSD-3-Clause
"""The ring's folds with ``invariant``: pairs of tiles, joined along trees; Note [invariant].

The steps and messages are those of loop.py. What a fold does is different: one kernel call per pair
of tiles, from zero, and what it gives waits in a tree for the other half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import loop, ops
from .mask_algebra import refuse
from .messages import Blocks, Rows
from .rank_plan import Plan
from .ring import Transport
from .steps import Step
from .tile_sums import TileSums
from .tiles import Tiles
from .tree import Tree, Trees, Value, add_sums, join_states


def _cut(tiles: Sequence[int], rows: int) -> dict[int, slice]:
    """Where the tiles of a shard are in it."""
    return {tile: slice(n * rows, (n + 1) * rows) for n, tile in enumerate(tiles)}


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
    tiles = _tiles(plan, q)
    q, k, v = map(_with_rows, (q, k, v))
    own = _cut(tiles.q_held[plan.rank], tiles.q_rows)
    queries = {i: q[:, :, at] for i, at in own.items()}
    seen = {i: tiles.seen_by(i) for i in own}
    some_q = q[:, :, : tiles.q_rows]
    states = Trees(tiles.count, seen, lambda: ops.empty_state(some_q, v), join_states)
    out, lse = ops.empty_output(q, v)
    tile_lse = lse.new_empty(some_q.shape[:3])
    blocks = Blocks(transport, "K/V", Rows((k, v)))

    def fold(step: Step) -> None:
        where = {j: (o, at) for o in step.folds for j, at in plan.places(o).items()}
        for i, j in tiles.to_fold(plan.rank, where):
            origin, at = where[j]
            k, v = (x[:, :, at : at + tiles.k_rows] for x in blocks[origin].tensors)
            begin, end = tiles.intervals(i, j, q.device)
            acc, m, l = states.buffer()  # noqa: E741
            ops.fold_(
                queries[i],
                [k],
                [v],
                [begin],
                [end],
                sinks if j == seen[i][0] else None,  # they count once, in the first leaf
                acc,
                m,
                l,
                None,
                None,
                first=True,
                last=False,
                scale=scale,
                softcap=softcap,
            )
            states[i].add(j, (acc, m, l))
            finish(i)

    def finish(i: int) -> None:
        if (state := states.take(i)) is not None:
            acc, m, l = state  # noqa: E741
            ops.finish_(acc, m, l, out[:, :, own[i]], tile_lse)
            lse[:, :, own[i]] = tile_lse
            states.give_back(state)

    loop.around(plan, transport, blocks, fold)
    for i, at in own.items():
        if not seen[i]:  # out = 0, lse = -inf or the sink
            ops.fold_(
                queries[i],
                [],
                [],
                [],
                [],
                sinks,
                None,
                None,
                None,
                out[:, :, at],
                tile_lse,
                first=True,
                last=True,
                scale=scale,
                softcap=softcap,
            )
            lse[:, :, at] = tile_lse
    return out, lse


def backward(
    plan: Plan,
    transport: Transport,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As loop.backward, but of dsinks rank 0 has all and the others have zeros."""
    tiles, rank = _tiles(plan, q), plan.rank
    q, k, v, dout = map(_with_rows, (q, k, v, dout))
    own = _cut(tiles.q_held[rank], tiles.q_rows)
    own_keys = _cut(tiles.k_held[rank], tiles.k_rows)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rows = {}
    for i, at in own.items():
        part = dlse if dlse is None else dlse[:, :, at].contiguous()
        delta = ops.delta(out[:, :, at], dout[:, :, at], part)
        rows[i] = q[:, :, at], dout[:, :, at], lse[:, :, at].contiguous(), delta

    def make(*like: tuple[Tensor, int]) -> Callable[[], Value]:
        return lambda: tuple(lse.new_empty((*x.shape[:2], n, x.shape[3])) for x, n in like)

    seen = {i: tiles.seen_by(i) for i in own}
    viewers = {j: tiles.viewers(j) for j in range(tiles.count)}
    dqs = Trees(tiles.count, seen, make((q, tiles.q_rows)), add_sums)
    dkvs = Trees(tiles.count, viewers, make((k, tiles.k_rows), (v, tiles.k_rows)), add_sums)

    def write(j: int) -> None:
        if j in own_keys:
            dkvs.write(j, (dk[:, :, own_keys[j]], dv[:, :, own_keys[j]]))

    blocks = Blocks(transport, "K/V", Rows((k, v)))
    like = Rows(tuple(lse.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (k, v)))
    sums = TileSums(transport, tiles, like, dkvs, write)

    def fold(origins: Sequence[int], keys: loop.Keys) -> None:
        where = {j: (o, at) for o in origins for j, at in plan.places(o).items()}
        if keys is not None:
            where = {j: place for j, place in where.items() if keys[0] <= place[1] < keys[1]}
        for i, j in tiles.to_fold_backward(rank, where):
            origin, at = where[j]
            k, v = (x[:, :, at : at + tiles.k_rows] for x in blocks[origin].tensors)
            begin, end = tiles.intervals(i, j, q.device)
            (into,), (into_k, into_v) = dqs.zeros(), dkvs.zeros()
            ops.fold_backward_(
                *rows[i],
                [k],
                [v],
                [begin],
                [end],
                into,
                [into_k],
                [into_v],
                scale=scale,
                softcap=softcap,
            )
            dqs[i].add(j, (into,))
            dqs.write(i, (dq[:, :, own[i]],))
            dkvs[j].add(i, (into_k, into_v))
            write(j)

    steps = plan.backward_steps
    loop.send_home(plan, steps, plan.held_rows, transport, "backward", blocks, sums, fold)
    dsinks = lse.new_empty(0)
    if sinks is not None:
        each = {i: ops.sink_gradient(sinks, lse, delta) for i, (_, _, lse, delta) in rows.items()}
        dsinks = _sum_over_ranks(tiles, transport, each, sinks)
    return dq, dk, dv, dsinks


def _sum_over_ranks(
    tiles: Tiles, transport: Transport, each: dict[int, Tensor], like: Tensor
) -> Tensor:
    """The sum over all tiles on rank 0 and zeros elsewhere: whoever adds ranks up gets it exactly.

    Args:
        each: of the own tiles, shaped like `like`.
    """
    mine = like.new_zeros((tiles.count, *like.shape))
    for i, value in each.items():
        mine[i] = value
    gathered = transport.gather_equal(mine)
    if transport.rank > 0:
        return torch.zeros_like(like)
    tree: Tree[Tensor] = Tree(tiles.count, range(tiles.count), torch.add)
    for held, parts in zip(tiles.q_held, gathered, strict=True):
        for i in held:
            tree.add(i, parts[i])
    return tree.pending[1]


def _with_rows(x: Tensor) -> Tensor:
    """Copied here where kernels would copy every tile of it in every pair."""
    return x if x.stride(3) == 1 else x.contiguous()


def _tiles(plan: Plan, q: Tensor) -> Tiles:
    assert plan.tiles is not None
    name = "RING_ATTENTION_CUDA_BACKWARD"
    if q.is_cuda and os.environ.get(name) == "atomic":
        remedy = "its sums have no order: unset it, or leave invariant out"
        refuse("attention", f"no {name}=atomic with invariant", "it", remedy)
    return plan.tiles
