# SPDX-License-Identifier: BSD-3-Clause
"""Attention problems that reach all paths of a kernel, and what must come of them.

References and the bound for each entry are those of test_ops.py: what gets by here, the operators'
tests would not see either.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import test_ops as t


@dataclass
class Case:
    """A call and what it must give: each entry within `bounds` of `exact`, infinities exactly.

    `rms`: of each tensor's whole error. Roundings are independent of one another, so it is a few
    times smaller than what one entry may have.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    exact: Sequence[Tensor]
    bounds: Sequence[Tensor]
    rms: Sequence[float]

    def wrong(self, got: Sequence[Tensor]) -> bool:
        for a, b, bound, rms in zip(got, self.exact, self.bounds, self.rms, strict=True):
            infinite = torch.isinf(b)
            if not torch.equal(a.double()[infinite], b[infinite]):
                return True
            difference = (a.double() - b).masked_fill(infinite, 0.0).abs()
            # Written so that NaN is wrong.
            if not bool((difference <= bound + torch.finfo(a.dtype).tiny).all()):
                return True
            if not difference.square().mean().sqrt().item() <= rms:
                return True
        return False


def case(name: str, p: t.Problem, run: Callable[[], Sequence[Tensor]], parts: slice) -> Case:
    """A case whose results are these of out, lse, dq, dk, dv, dsinks."""
    exact = t.theirs(p, torch.float64)
    plain = t.theirs(p, p.q.dtype)
    eps = torch.finfo(p.q.dtype).eps
    rms = []
    for a, b in zip(plain, exact, strict=True):
        finite = torch.isfinite(b)
        size = b[finite].square().mean().sqrt().item() if finite.any() else 0.0
        error = (a.double() - b)[finite].square().mean().sqrt().item() if finite.any() else 0.0
        rms.append(2 * max(error if math.isfinite(error) else math.inf, eps * size))
    rms[1] = math.inf  # lse, which is float32 here and not in torch: its bound is tight
    return Case(name, run, exact[parts], t.bounds(p, exact)[parts], rms[parts])


def odd_one(batch: int, q_len: int, k_len: int, *, only: bool) -> t.Interval:
    """One row of each sample sees other keys than its neighbours, or is the only one to see any."""
    begin = torch.full((batch, q_len), k_len if only else 0)
    end = torch.full((batch, q_len), 0 if only else k_len)
    for sample in range(batch):
        row = min(2 ** (sample // 2) + sample % 2, q_len - 1)  # a bit of its number for each sample
        begin[sample, row], end[sample, row] = (9, 30) if sample % 2 else (k_len - 40, k_len - 11)
    return t.stacked((begin, end))


def moving_gap(batch: int, q_len: int, k_len: int) -> t.Interval:
    """Two stretches; before, between and after them are keys that no row sees."""
    rows = torch.arange(q_len)[None]
    return t.stacked((3 + rows // 2, 20 + rows // 2), (70 + rows, 90 + rows))


def rising_gap(batch: int, q_len: int, k_len: int) -> t.Interval:
    """A short stretch, which jumps from one row to the next."""
    late = torch.arange(q_len)[None] >= q_len // 3
    return t.stacked((torch.where(late, 67, 0), torch.where(late, 70, 3)))


def falling_gap(batch: int, q_len: int, k_len: int) -> t.Interval:
    return tuple(x.flip(-1) for x in rising_gap(batch, q_len, k_len))  # type: ignore[return-value]


def turns(batch: int, q_len: int, k_len: int) -> t.Interval:
    """Some rows see all keys by their first interval, the others a few by their second."""
    rows = torch.arange(q_len)[None]
    first = rows < q_len // 2
    return t.stacked(
        (0 * rows, torch.where(first, k_len, 0)), (rows // 2, torch.where(first, 0, rows - 5))
    )


def garbage(p: t.Problem) -> t.Problem:
    """NaN in the keys and values that no row of a sample sees."""
    unseen = ~p.visible.any(dim=1)[:, None, :, None].expand(p.k.shape[0], -1, -1, -1)
    assert unseen.any()
    return replace(p, **{x: getattr(p, x).masked_fill(unseen, math.nan) for x in ("k", "v")})


def rising(p: t.Problem) -> t.Problem:
    """Scores that grow along the keys: the reference of the softmax must move."""
    k_len = p.k.shape[2]
    growth = torch.linspace(0.25, 6.0, k_len)[:, None]
    return replace(
        p, k=(p.k.float().abs() * growth).to(p.k.dtype), q=p.q.abs() * p.q.sign()[..., :1]
    )


def problems(dtype: torch.dtype, dim: int, v_dim: int, softcap: float) -> Iterator[tuple[str, Any]]:
    """The name of each call, the problem, and at which keys it is cut."""

    def problem(mask: Any, heads: int, kv_heads: int, q_len: int, k_len: int, **more: Any) -> Any:
        shape: dict[str, Any] = {
            "head_dim": dim,
            "v_head_dim": v_dim,
            "softcap": softcap,
            "batch": 1,
        }
        shape |= {"heads": heads, "kv_heads": kv_heads, "q_len": q_len, "k_len": k_len}
        return t.problem(dtype, mask, **{**shape, **more})

    pairs = problem(t.scattered_pairs, 4, 2, 37, 53, batch=2, sinks=True)
    pairs.sinks[1] = -math.inf  # none
    yield "pairs", (pairs, (20,))
    yield "one head", (problem(t.bottom_right, 1, 1, 70, 131), (64, 64, 128))
    narrow = {"head_dim": dim - 8, "v_head_dim": v_dim - 24}
    yield "narrow", (problem(t.scattered, 2, 1, 41, 90, storage="sliced", **narrow), (33,))
    for only in (False, True):
        odd = problem(partial(odd_one, only=only), 1, 1, 40, 128, batch=12)
        yield ("one row sees" if only else "one row differs"), (odd, (70,))
    for gap in (moving_gap, falling_gap, rising_gap):
        yield f"garbage, {gap.__name__}", (problem(gap, 2, 1, 41, 137, dlse=False), (66,))
    yield "turns", (problem(turns, 1, 1, 130, 150), (128,))
    yield "intervals", (problem(partial(t.scattered, n=11), 2, 2, 35, 203), ())
    cuts = (7, 16, 24, 33, 40, 48, 49, 80)
    yield "nine blocks", (problem(t.causal, 1, 1, 90, 90, sinks=True), cuts)
    yield "rising", (rising(problem(t.window, 2, 2, 97, 97, scale=1.0)), ())
    yield "causal", (problem(t.causal, 2, 2, 200, 200, storage="bshd"), ())
    yield "grouped", (problem(t.padded, 3, 1, 130, 192), ())
    yield "few rows", (problem(t.bottom_right, 1, 1, 3, 1100, sinks=True), (500,))
