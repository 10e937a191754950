# SPDX-License-Identifier: BSD-3-Clause
"""Small calls that drive a forward kernel, or that of the parts, through all of its paths."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from mutant_problems import Case, Drive, case, garbage, into_garbage, problems
from torch import Tensor

import intervals as masks
import problems as t
from bounds import state_bounds
from ring_attention import reference

OUT = slice(0, 2)  # of out, lse, dq, dk, dv


def cases(drive: Drive) -> Iterator[Case]:
    for name, (p, cuts) in problems(drive):
        given = garbage(p) if name.startswith("garbage") else p
        kv = t.blocks(given, cuts)
        alone = [[block] for block in kv]
        calls: dict[str, Sequence[Any]] = {"whole": [t.blocks(given, ())]}
        if cuts:
            calls |= {"cut": [kv], "one by one": alone, "carried": [[], *alone, []]}
        for how, groups in calls.items():
            yield case(f"{name}, {how}", p, partial(t.folded, given, groups), OUT)
    yield from dims_cases(drive)
    yield from state_cases(drive)


def dims_cases(drive: Drive) -> Iterator[Case]:
    """Each number of columns that the kernel serves: whole, and in parts of the keys."""
    dtype, (dim, v_dim) = drive.dtype, drive.dims
    # One more than few, for which 16-bit inputs have a kernel.
    rows = min(33, drive.rows) if dtype != torch.float32 else 9
    one: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1, "softcap": drive.softcap}
    for narrow in range(16, v_dim + 1, 8):
        # A kernel is chosen by the larger one.
        head_dim = dim if narrow < v_dim else max(16, dim - 40)
        shape = one | {"head_dim": head_dim, "v_head_dim": narrow}
        p = t.problem(dtype, q_len=rows, k_len=40, **shape)
        yield case(f"to odd elements, {narrow}", p, partial(to_odd_elements, p), OUT)
        p = t.problem(dtype, masks.scattered, q_len=rows, k_len=520, **shape)
        yield case(f"parts, {narrow}", p, partial(t.folded, p, [t.blocks(p, ())]), OUT)
        # Parts are joined four by four, and one by one what is left.
        k_len = 520 if narrow % 16 else 1100
        p = t.problem(dtype, masks.full, q_len=1, k_len=k_len, **shape)
        yield state_case(f"parts of one row, {narrow}", p, t.any_state(p))
    for head_dim in range(16, dim, 8):
        shape = one | {"head_dim": head_dim, "v_head_dim": v_dim}
        p = t.problem(dtype, masks.full, q_len=1, k_len=9, **shape)
        yield case(f"head dim {head_dim}", p, partial(t.folded, p, [t.blocks(p, ())]), OUT)


def state_cases(drive: Drive) -> Iterator[Case]:
    """Of states that are not the call's own, without keys, with some and in parts."""
    shape: dict[str, Any] = {"head_dim": drive.dims[0], "v_head_dim": drive.dims[1]}
    shape |= {
        "heads": 2,
        "kv_heads": 1,
        "softcap": drive.softcap,
        "q_len": min(40, drive.rows // 2),
    }
    for k_len in (0, 40, 520):
        p = t.problem(drive.dtype, masks.scattered, k_len=k_len, **shape)
        p.end[..., 0] = p.begin[..., 0]  # one row at least sees nothing
        state = t.any_state(p)
        yield state_case(f"any state, {k_len}", p, state)
        yield state_case(f"any state, {k_len}, kept", p, state, last=False)
        yield empty_case(p)


def kv_of(p: t.Problem) -> Sequence[Any]:
    return t.blocks(p, ()) if p.k.shape[2] else []


def state_case(name: str, p: t.Problem, state: t.State, last: bool = True) -> Case:
    """(out, lse) of the state with all keys, as written or from the state that is written."""

    def run() -> Sequence[Tensor]:
        ours = [x.clone() for x in state]
        if last:
            return into_garbage(
                p, lambda out, lse: t.fold_(p, kv_of(p), ours, (out, lse), last=True)
            )
        t.fold_(p, kv_of(p), (ours[0], ours[1], ours[2]))
        out, lse = reference.finish(reference.State(*(x.double() for x in ours)))
        return out.to(p.q.dtype), lse.to(state[1].dtype)

    exact = reference.finish(t.after(p, state))
    return Case(name, run, exact, state_bounds(p, state), [math.inf, math.inf])


def empty_case(p: t.Problem) -> Case:
    """The states of rows that see nothing."""
    empty = ~p.visible.any(dim=-1)[:, None].expand(p.q.shape[:3])
    exact = [torch.zeros(int(empty.sum()), p.v.shape[3]).double()]
    exact += [torch.full(exact[0].shape[:1], x).double() for x in (-math.inf, 0.0)]

    def run() -> Sequence[Tensor]:
        state = t.new_state(p)
        t.fold_(p, kv_of(p), state, first=True)
        return [x[empty] for x in state]

    zeros = [torch.zeros_like(x) for x in exact]
    return Case(f"empty, {p.k.shape[2]}", run, exact, zeros, [math.inf] * 3)


def to_odd_elements(p: t.Problem) -> Sequence[Tensor]:
    return into_garbage(
        p, lambda out, lse: t.fold_(p, t.blocks(p, ()), None, (out, lse), first=True, last=True), 1
    )
