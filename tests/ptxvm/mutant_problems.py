# SPDX-License-Identifier: BSD-3-Clause
"""Attention problems that reach all paths of a kernel, and what must come of them.

References and the bound for each entry are those of the operators' tests: what gets by here, those
tests would not see either.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import intervals as masks
from bounds import bounds
from problems import Problem, new_output, problem, theirs
from ring_attention import ops, reference


@dataclass
class Case:
    """A call and what it must give: each entry within `bounds` of `exact`, infinities exactly.

    `rms`: of each tensor's whole error. Roundings are independent of one another, so it is a few
    times smaller than what one entry may have: twice the error of torch in the same dtype, of one
    rounding, or of gradients by an lse that is rounded, whichever is most.
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


def handed_lse(p: Problem, exact: Sequence[Tensor]) -> list[Tensor]:
    """The gradients by exact arithmetic that is handed lse in the state's dtype, as kernels are.

    Half an ulp of lse is a relative error of P = exp(S - lse): of scores in the hundreds more than
    float32's own, and torch, whose softmax subtracts the row's maximum, does not have it.
    """
    lse = exact[1].to(ops.state_dtype(p.q.dtype))
    given = (p.dout, p.dlse, p.q, p.k, p.v, exact[0], lse)
    gradients = reference.backward(
        *(None if x is None else x.double() for x in given),
        p.visible, scale=p.scale, softcap=p.softcap,
        sinks=None if p.sinks is None else p.sinks.double(),
    )  # fmt: skip
    return [x for x in gradients if x is not None]


def case(name: str, p: Problem, run: Callable[[], Sequence[Tensor]], parts: slice) -> Case:
    """A case whose results are these of out, lse, dq, dk, dv, dsinks."""
    exact = theirs(p, torch.float64)
    eps = torch.finfo(p.q.dtype).eps
    rms = []
    for plain, handed, best in zip(
        theirs(p, p.q.dtype), exact[:2] + handed_lse(p, exact), exact, strict=True
    ):
        finite = torch.isfinite(best)
        size, *errors = (
            x[finite].square().mean().sqrt().item() if finite.any() else 0.0
            for x in (best, plain.double() - best, handed - best)
        )
        rms.append(2 * max(eps * size, *(x if math.isfinite(x) else math.inf for x in errors)))
    rms[1] = math.inf  # lse, which is float32 here and not in torch: its bound is tight
    return Case(name, run, exact[parts], bounds(p, exact)[parts], rms[parts])


def garbage(p: Problem) -> Problem:
    """NaN in the keys and values that no row of a sample sees."""
    unseen = ~p.visible.any(dim=1)[:, None, :, None].expand(p.k.shape[0], -1, -1, -1)
    assert unseen.any()
    return replace(p, **{x: getattr(p, x).masked_fill(unseen, math.nan) for x in ("k", "v")})


def into_garbage(p: Problem, write: Callable[[Tensor, Tensor], None], odd: int = 0) -> list[Tensor]:
    """(out, lse) as written into larger tensors, of which nothing else may be written.

    odd: 1 for rows of `out` that lie on no pair of elements.
    """
    out, lse = new_output(p)
    b, h, q, d = out.shape
    wide = out.new_full((b, h + 1, q + 2, d + 16 + odd), math.nan)
    view = wide[:, 1:, 1:-1, 8 - odd : -8 - 2 * odd]
    write(view, lse)
    got = view.clone()
    view.fill_(math.nan)
    return [got if wide.isnan().all() else torch.full_like(got, math.nan), lse]


def rising(p: Problem) -> Problem:
    """Scores that grow along the keys: the reference of the softmax must move."""
    k_len = p.k.shape[2]
    growth = torch.linspace(0.25, 6.0, k_len)[:, None]
    return replace(
        p, k=(p.k.float().abs() * growth).to(p.k.dtype), q=p.q.abs() * p.q.sign()[..., :1]
    )


def spikes(p: Problem) -> Problem:
    """One key of each 64 has all the weight of a row, another for each row and higher each time.

    Sizes are any between 15 and 16, times 1 to 4: of powers of two q k and lse would be exact.
    """
    dim, q_len, k_len = p.q.shape[3], p.q.shape[2], p.k.shape[2]
    directions = torch.cat([torch.randperm(min(dim, 64)) for _ in range(k_len // 64)])
    q, k = torch.zeros_like(p.q), torch.zeros_like(p.k)
    size = (15 + torch.rand(k_len)) * (1 + torch.arange(k_len) // 64)
    q[:, :, range(q_len), torch.arange(q_len) % min(dim, 64)] = (15 + torch.rand(q_len)).to(q.dtype)
    k[:, :, range(len(directions)), directions] = size[: len(directions)].to(k.dtype)
    return replace(p, q=q, k=k)


def apart(p: Problem) -> Problem:
    """Five stretches of keys, scores 200 apart: they rise for one row and fall for the next."""
    k_len = p.k.shape[2]
    q, k = p.q.clone(), p.k.clone()
    q[..., 0] = 16.0 * (-1.0) ** torch.arange(q.shape[2])
    k[..., 0] = 200.0 * (5 * torch.arange(k_len) // k_len)
    return replace(p, q=q, k=k)


@dataclass
class Drive:
    """What calls have in common so that they end up in one kernel."""

    dtype: torch.dtype
    dims: tuple[int, int]
    softcap: float = 0.0
    rows: int = 1 << 20  # at most, of all heads of a group


def problems(drive: Drive) -> Iterator[tuple[str, Any]]:
    """The name of each call, the problem, and at which keys it is cut."""
    dim, v_dim = drive.dims

    def of(mask: Any, heads: int, kv_heads: int, q_len: int, k_len: int, **more: Any) -> Any:
        shape: dict[str, Any] = {"head_dim": dim, "v_head_dim": v_dim, "softcap": drive.softcap}
        shape |= {"batch": 1, "heads": heads, "kv_heads": kv_heads, "k_len": k_len}
        shape["q_len"] = min(q_len, drive.rows * kv_heads // heads)
        return problem(drive.dtype, mask, **{**shape, **more})

    # Three heads packed into a tile: no power of two, as its fragments' rows are.
    pairs = of(masks.scattered_pairs, 6, 2, 37, 53, batch=2, sinks=True)
    pairs.sinks[1] = -math.inf  # none
    yield "pairs", (pairs, (20,))
    yield "one head", (of(masks.bottom_right, 1, 1, 70, 131), (64, 64, 128))
    narrow = {"head_dim": dim - 8, "v_head_dim": v_dim - 24}
    yield "narrow", (of(masks.scattered, 2, 1, 41, 90, storage="sliced", **narrow), (33,))
    for mask in (masks.one_row_differs, masks.one_row_sees):
        yield mask.__name__, (of(mask, 1, 1, 40, 128, batch=12), (70,))
    for gap in masks.GAPS:
        yield f"garbage, {gap.__name__}", (of(gap, 2, 1, 41, 137, dlse=False), (66,))
    yield "garbage, jumps", (of(masks.jumps, 1, 1, 128, 90, batch=4, dlse=False), ())
    yield "shifted", (of(masks.shifted, 1, 1, 33, 150, batch=6), ())
    yield "turns", (of(masks.turns, 1, 1, 130, 150), (128,))
    yield "intervals", (of(partial(masks.scattered, n=11), 2, 2, 35, 203), ())
    cuts = (7, 16, 24, 33, 40, 48, 49, 80)
    yield "nine blocks", (of(masks.causal, 1, 1, 90, 90, sinks=True), cuts)
    high = {"softcap": 20 * drive.softcap}  # scores that move by more than the reference is lazy
    yield "rising", (rising(of(masks.full, 1, 1, 130, 150, scale=0.4, **high)), ())
    yield "spikes", (spikes(of(masks.full, 1, 1, 70, 256, scale=1.0, dlse=False, **high)), ())
    yield "causal", (of(masks.causal, 2, 2, 200, 200, storage="bshd"), ())
    yield "grouped", (of(masks.padded, 3, 1, 130, 192, batch=2), ())
    yield "few rows", (of(masks.bottom_right, 2, 1, 3, 1100, batch=2, sinks=True), (500,))
    far = apart(of(masks.full, 1, 1, 8, 1400, scale=1 / 16, **high))
    yield "apart", (far, (280, 560, 840, 1120))
    # Of 128 or 32 rows, some warps have none.
    yield "half a tile", (of(masks.full, 1, 1, 64 if drive.rows > 64 else 16, 70), ())
