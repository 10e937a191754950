# SPDX-License-Identifier: BSD-3-Clause
"""Small calls that drive a CUDA kernel through all of its paths.

What a case needs from other kernels, a backward's lse and delta, is computed once, when it is made
and by the kernels as compiled.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mutant_problems import Case, Drive, case, garbage, problems
from torch import Tensor

import intervals as masks
import problems as t
from ring_attention import ops

# Of out, lse, dq, dk, dv.
OUT, GRADIENTS = slice(0, 2), slice(2, 5)


def forward_cases(drive: Drive) -> Iterator[Case]:
    for name, (p, cuts) in problems(drive):
        given = garbage(p) if name.startswith("garbage") else p
        kv = t.blocks(given, cuts)
        alone = [[block] for block in kv]
        calls: dict[str, Sequence[Any]] = {"whole": [t.blocks(given, ())]}
        if cuts:
            calls |= {"cut": [kv], "one by one": alone, "carried": [[], *alone, []]}
        for how, groups in calls.items():
            yield case(f"{name}, {how}", p, partial(t.folded, given, groups), OUT)
    one: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1, "softcap": drive.softcap}
    for narrow in range(16, drive.dims[1] + 1, 8):
        shape = one | {"head_dim": drive.dims[0], "v_head_dim": narrow}
        p = t.problem(drive.dtype, q_len=min(33, drive.rows), k_len=40, **shape)
        yield case(f"to odd elements, {narrow}", p, partial(to_odd_elements, p), OUT)
        p = t.problem(drive.dtype, masks.scattered, q_len=32, k_len=520, **shape)
        yield case(f"parts, {narrow}", p, partial(t.folded, p, [t.blocks(p, ())]), OUT)


def to_odd_elements(p: t.Problem) -> list[Tensor]:
    """Into rows that lie on no pair of elements."""
    out, lse = t.new_output(p)
    rows = out.new_full((*out.shape[:3], out.shape[3] + 3), math.nan)[..., 1:-2]
    t.fold_(p, t.blocks(p, ()), None, (rows, lse), first=True, last=True)
    return [rows, lse]


def backward_problems(drive: Drive) -> Iterator[tuple[str, Any]]:
    dtype, (dim, v_dim) = drive.dtype, drive.dims
    yield from problems(drive)
    # Here the softcap is not another kernel.
    capped = itertools.islice(problems(replace(drive, softcap=3.0)), 3)
    yield from ((f"capped, {name}", call) for name, call in capped)
    one: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1}
    few = t.problem(dtype, masks.full, q_len=530, k_len=9, head_dim=dim, v_head_dim=v_dim, **one)
    yield "few keys", (few, (5,))
    for narrow in range(16, min(dim, v_dim), 8):
        other = max(16, min(dim, v_dim) + 8 - narrow)
        yield f"narrow, {narrow}", (
            t.problem(dtype, q_len=16, k_len=16, head_dim=narrow, v_head_dim=other, **one), ()
        )  # fmt: skip


def backward_cases(drive: Drive) -> Iterator[Case]:
    for name, (p, cuts) in backward_problems(drive):
        out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale, p.softcap)
        delta = ops.delta(out, p.dout, p.dlse)
        given = garbage(p) if name.startswith("garbage") else p
        kv = t.blocks(given, cuts)
        calls: dict[str, Sequence[Any]] = {"whole": [t.blocks(given, ())]}
        if cuts:
            calls |= {"cut": [kv], "one by one": [[block] for block in kv]}
        for how, groups in calls.items():
            run = partial(added, given, lse, delta, groups)
            yield added_to_ones(case(f"{name}, {how}", p, run, GRADIENTS), len(groups))
    yield far_rows(drive.dtype, *drive.dims)


def far_rows(dtype: torch.dtype, dim: int, v_dim: int) -> Case:
    """So many queries, of which three see keys, that they are searched for in groups of groups."""
    q_len, places = 70_000, torch.tensor([0, 9_000, 69_998])
    end = torch.tensor([[[3, 9, 16]]], dtype=torch.int32)
    p = t.problem(
        dtype, lambda *_: (end - 3, end), batch=1, heads=1, kv_heads=1, q_len=3, k_len=16,
        head_dim=dim, v_head_dim=v_dim,
    )  # fmt: skip
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    delta = ops.delta(out, p.dout, p.dlse)

    def spread(x: Tensor, rest: float = 0.0) -> Tensor:
        wide = torch.full((*x.shape[:2], q_len, *x.shape[3:]), rest).to(x.dtype)
        wide[:, :, places] = x
        return wide

    far = replace(p, q=spread(p.q), dout=spread(p.dout), begin=spread(p.begin), end=spread(p.end))
    wide_lse, wide_delta = spread(lse, -math.inf), spread(delta)
    run = partial(added, far, wide_lse, wide_delta, [t.blocks(far, ())])
    made = case("far rows", p, run, GRADIENTS)
    made.exact = [spread(made.exact[0]), *made.exact[1:]]
    made.bounds = [spread(made.bounds[0]), *made.bounds[1:]]
    return added_to_ones(made, 1)


def added_to_ones(made: Case, calls: int) -> Case:
    """What each sum is added to is rounded too, once per call."""
    eps = torch.finfo(torch.float32).eps * calls
    made.bounds = [x + eps * (1 + y.abs()) for x, y in zip(made.bounds, made.exact, strict=True)]
    made.rms = [x + eps for x in made.rms]
    return made


def added(
    p: t.Problem, lse: Tensor, delta: Tensor, groups: Sequence[Sequence[Any]]
) -> list[Tensor]:
    """dq, dk, dv as added to ones: what is there already counts."""
    dq = torch.ones(p.q.shape)
    dks, dvs = [], []
    for group in groups:
        k, v, begin, end = (list(x) for x in zip(*group, strict=True))
        dk, dv = ([torch.ones(x.shape) for x in xs] for xs in (k, v))
        ops.block_backward_(
            p.q, p.dout, lse, delta, k, v, begin, end, dq, dk, dv, p.scale, p.softcap
        )
        dks += dk
        dvs += dv
    return [x - 1 for x in (dq, torch.cat(dks, dim=2), torch.cat(dvs, dim=2))]


def row_cases(drive: Drive) -> Iterator[Case]:
    """The kernels that take a warp for each row: combine, finish, delta, the sinks' gradient."""
    # A lane takes every 32nd column, the compiler four of them at a time; 333 rows fill no block.
    for mask, dim in ((masks.scattered, 40), (masks.full, 136), (masks.scattered, 256)):
        shape = {"batch": 3, "heads": 3, "kv_heads": 1, "head_dim": 48, "v_head_dim": dim}
        p = t.problem(drive.dtype, mask, k_len=101, sinks=True, **shape)
        name = f"{mask.__name__} {dim}"
        states = halves(p)
        for how, both in {"in order": states, "swapped": states[::-1]}.items():
            yield case(f"combine, {name}, {how}", p, partial(combined, p, both), OUT)
        state = t.new_state(p)
        t.fold_(p, t.blocks(p, ()), state, first=True)
        yield case(f"finish, {name}", p, partial(finished, p, state), OUT)
        out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale)
        for storage in ("bhsd", "bshd"):
            for dlse in (p.dlse, None):
                yield delta_case(t.stored(out, storage), t.stored(p.dout, storage), dlse)
        delta = ops.delta(out, p.dout, p.dlse)
        assert p.sinks is not None
        p.sinks[1] = -math.inf  # an absent one: no gradient
        yield sink_case(p.sinks, lse, delta)
        # More rows than threads.
        yield sink_case(p.sinks, *(torch.randn(3, 3, 230) for _ in range(2)))


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
    out, lse = t.new_output(p)
    wide = out.new_full((*out.shape[:2], out.shape[2] + 1, out.shape[3] + 8), math.nan)
    view = wide[:, :, 1:, 8:]
    ops.finish_(*state, view, lse)
    return view, lse


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
