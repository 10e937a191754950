# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the kernels with a warp for each row: combine, finish, delta, the sinks' gradient."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from mutant_problems import Case, Drive, case, into_garbage
from torch import Tensor

import intervals as masks
import problems as t
from bounds import state_bounds
from ring_attention import ops, reference

OUT = slice(0, 2)  # of out, lse, dq, dk, dv


def cases(drive: Drive) -> Iterator[Case]:
    """The kernels that take a warp for each row: combine, finish, delta, the sinks' gradient."""
    # A lane takes every 32nd column, the compiler four of them at a time; 333 rows fill no block.
    shapes = (
        (masks.scattered, 16),
        (masks.scattered, 40),
        (masks.full, 136),
        (masks.scattered, 256),
    )
    for mask, dim in shapes:
        shape = {"batch": 3, "heads": 3, "kv_heads": 1, "head_dim": 48, "v_head_dim": dim}
        p = t.problem(drive.dtype, mask, k_len=101, sinks=True, **shape)
        name = f"{mask.__name__} {dim}"
        states = halves(p)
        for how, both in {"in order": states, "swapped": states[::-1]}.items():
            yield case(f"combine, {name}, {how}", p, partial(combined, p, both), OUT)
        state = t.new_state(p)
        t.fold_(p, t.blocks(p, ()), state, first=True)
        yield case(f"finish, {name}", p, partial(finished, p, state), OUT)
        given = t.any_state(p)
        none = replace(p, k=p.k[:, :, :0], v=p.v[:, :, :0])
        yield Case(
            f"finish any, {name}", partial(finished, none, given),
            reference.finish(t.after(none, given)), state_bounds(none, given), [math.inf, math.inf],
        )  # fmt: skip
        yield combine_case(none, given, t.any_state(p))
        out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale)
        for storage in ("bhsd", "bshd"):
            for dlse in (p.dlse, None):
                yield delta_case(t.stored(out, storage), t.stored(p.dout, storage), dlse)
        delta = ops.delta(out, p.dout, p.dlse)
        assert p.sinks is not None
        p.sinks[1] = -math.inf  # an absent one: no gradient
        yield sink_case(p.sinks, lse, delta)
        # More rows than threads, by less and more than the four that the compiler takes at a time.
        for q_len in (230, 430):
            yield sink_case(p.sinks, *(torch.randn(3, 3, q_len) for _ in range(2)))


def halves(p: t.Problem) -> list[t.State]:
    """States of the first keys, with the sinks, and of the others."""
    kv = t.blocks(p, (40,))
    states = [t.new_state(p), t.new_state(p)]
    t.fold_(p, kv[:1], states[0], first=True)
    t.fold_(replace(p, sinks=None), kv[1:], states[1], first=True)
    return states


def combined(p: t.Problem, states: Sequence[t.State]) -> Sequence[Tensor]:
    ours = [x.clone() for x in states[0]]
    ops.combine_(*ours, *states[1])
    return finished(p, ours)


def finished(p: t.Problem, state: Sequence[Tensor]) -> Sequence[Tensor]:
    return into_garbage(p, lambda out, lse: ops.finish_(*state, out, lse))


def combine_case(p: t.Problem, ours: t.State, theirs: t.State) -> Case:
    """Of states whose references are far apart. p: without keys."""
    exact = reference.combine(*(reference.State(*(x.double() for x in s)) for s in (ours, theirs)))
    eps = torch.finfo(torch.float32).eps
    out, lse = reference.finish(exact)
    # A weight is 2 to a difference of references, which are up to 300.
    size = torch.maximum(*((x[0] / x[2].clamp(min=1)[..., None]).abs() for x in (ours, theirs)))
    bounds = [eps * 1000 * size + torch.finfo(p.q.dtype).eps * out.abs(), eps * (1000 + lse.abs())]
    return Case(
        "combine any", partial(combined, p, (ours, theirs)), [out, lse], bounds, [math.inf] * 2
    )


def delta_case(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Case:
    products = out.double() * dout.double()
    size = products.abs().sum(dim=-1) + (0 if dlse is None else dlse.double().abs())
    exact = products.sum(dim=-1) - (0 if dlse is None else dlse.double())
    # A lane sums every 32nd column, then lanes are added pairwise, then dlse.
    roundings = out.shape[-1] // 32 + 7
    bound = roundings * torch.finfo(torch.float32).eps * size
    return Case(
        "delta" + ("" if dlse is None else ", dlse"),
        lambda: [ops.delta(out, dout, dlse)], [exact], [bound], [math.inf],
    )  # fmt: skip


def sink_case(sinks: Tensor, lse: Tensor, delta: Tensor) -> Case:
    weights = torch.exp(sinks.double()[None, :, None] - lse.double())
    weights = weights.masked_fill(torch.isinf(sinks)[None, :, None], 0.0)
    exact = -(weights * delta.double()).sum(dim=(0, 2))
    size = 8 + 4 * (sinks.double()[None, :, None].nan_to_num(neginf=0.0).abs() + lse.double().abs())
    error = (weights * delta.double().abs() * size.nan_to_num(posinf=0.0)).sum(dim=(0, 2))
    bound = torch.finfo(torch.float32).eps * error
    return Case(
        "sinks", lambda: [ops.sink_gradient(sinks, lse, delta)], [exact], [bound], [math.inf]
    )
