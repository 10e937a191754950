# SPDX-License-Identifier: BSD-3-Clause
"""Small calls that drive a backward kernel through all of its paths.

What a case needs from other kernels, lse and delta, is computed once, when it is made and by the
kernels as compiled.
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

GRADIENTS = slice(2, 5)  # of out, lse, dq, dk, dv


def backward_problems(drive: Drive) -> Iterator[tuple[str, Any]]:
    dtype, (dim, v_dim) = drive.dtype, drive.dims
    yield from problems(drive)
    # Here the softcap is not another kernel.
    capped = itertools.islice(problems(replace(drive, softcap=3.0)), 3)
    yield from ((f"capped, {name}", call) for name, call in capped)
    one: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1}
    few = t.problem(dtype, masks.full, q_len=530, k_len=9, head_dim=dim, v_head_dim=v_dim, **one)
    yield "few keys", (few, (5,))
    late = t.problem(dtype, masks.late, q_len=40, k_len=700, head_dim=dim, v_head_dim=v_dim, **one)
    yield "late", (late, ())  # and few rows: keys in parts
    # Heads in parts, which lie in memory block after block.
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": dim, "v_head_dim": v_dim}
    parts = t.problem(dtype, masks.causal, q_len=40, k_len=90, **shape)
    yield "parts of blocks", (parts, (7, 16, 24, 33, 40, 48, 49))
    for narrow in range(16, min(dim, v_dim), 8):
        other = max(16, min(dim, v_dim) + 8 - narrow)
        yield f"narrow, {narrow}", (
            # More rows than a warp owns.
            t.problem(dtype, q_len=33, k_len=35, head_dim=narrow, v_head_dim=other, **one), ()
        )  # fmt: skip
    shape = one | {"q_len": 200, "k_len": 200, "head_dim": dim, "v_head_dim": v_dim}
    yield "window", (t.problem(dtype, masks.first_and_window, **shape), ())


def cases(drive: Drive) -> Iterator[Case]:
    for name, (p, cuts) in backward_problems(drive):
        yield from cases_of(name, p, cuts)
    yield far_rows(drive.dtype, *drive.dims)


def cases_of(name: str, p: t.Problem, cuts: Sequence[int]) -> Iterator[Case]:
    """Of all keys, of those of several blocks, and of one block after another."""
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


def far_rows(dtype: torch.dtype, dim: int, v_dim: int) -> Case:
    """So many queries, of which few see keys, that they are searched for in groups of groups.

    One in a group of 32 tiles of 64 queries, each in another tile: each step of a reduction counts.
    The last is in the second group of groups, and in the first one's part of the rows (of 108): it
    is found there after others, for the first block, and before any, for the second.
    """
    q_len = 70_000
    places = [0, *(64 * (32 * (bit + 1) + 2**bit) for bit in range(5)), 64 * 1080 + 1]
    end = (2 * torch.arange(len(places), dtype=torch.int32) + 4).clamp(max=15)[None, None]
    p = t.problem(
        dtype, lambda *_: (end - 3, end), batch=1, heads=1, kv_heads=1, q_len=len(places), k_len=16,
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
    run = partial(added, far, wide_lse, wide_delta, [t.blocks(far, (13,))])
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
