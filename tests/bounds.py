# SPDX-License-Identifier: BSD-3-Clause
"""How far the operators' results may be from the reference, for the operators' tests."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from problems import Problem, State, after, dlse_of, ours, theirs
from ring_attention import ops, reference


def bounds(p: Problem, exact: list[Tensor]) -> list[Tensor]:
    """How far rounding alone can carry each entry of `theirs`, to first order.

    A score is a sum with error eps sum |q_d k_d|, so p has that relative error, and one rounding
    to the inputs' dtype on its way into a 16-bit matrix product; ds likewise. The rest is sums of
    products, whose error is eps times the sum of magnitudes. One rounding of the result.
    """
    low, high = torch.finfo(p.q.dtype).eps, torch.finfo(ops.state_dtype(p.q.dtype)).eps
    # For 16-bit inputs the kernels' exp is good to 2.8e-6, see polynomial.inl.
    low, exp = (2 * low, 2.8e-6) if low > high else (0.0, 0.0)
    out, lse, dq, dk, dv = exact[:5]
    groups = p.q.shape[1] // p.k.shape[1]
    q, k, v, dout = (x.double().abs() for x in (p.q, p.k, p.v, p.dout))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    hidden = ~p.visible[:, None]
    size = (abs(p.scale) * (q @ k.mT) + p.softcap).masked_fill(hidden, 0.0)
    row = torch.nn.functional.pad(size, (0, 1)).amax(dim=-1, keepdim=True)  # also without keys
    sinks = torch.zeros(p.q.shape[1]).double() if p.sinks is None else p.sinks.double()
    row = row + sinks.abs().nan_to_num(posinf=0.0)[None, :, None, None]
    s = reference.scores(p.q.double(), p.k.double(), p.scale, p.softcap)
    shift = lse.masked_fill(torch.isinf(lse), 0.0)[..., None]
    prob = torch.exp(s - shift).masked_fill(hidden, 0.0)
    high_rel = high * (8 + 2 * size + 2 * row)
    # What is too small for the state's dtype may vanish; float16 has fixed steps below 2^-14.
    lost = torch.finfo(ops.state_dtype(p.q.dtype)).tiny
    step = torch.finfo(p.q.dtype).tiny * torch.finfo(p.q.dtype).eps if low else 0.0
    error_p = prob * (high_rel + low) + lost + step
    slope = 1 - (s / p.softcap) ** 2 if p.softcap else 1.0
    delta = (dout * (prob @ v)).sum(dim=-1, keepdim=True)
    delta = delta + dlse_of(p, lse).double().abs()[..., None]
    size_ds = abs(p.scale) * (dout @ v.mT + delta)
    error_ds = size_ds * (prob * (2 * high_rel + 2 * low * slope) + lost + step)
    error_ds = error_ds + abs(p.scale) * step

    def by_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (p.k.shape[1], groups)).sum(dim=2)

    last = torch.finfo(p.q.dtype).eps
    result = [
        error_p @ v + last * out.abs(),
        exp + high * (8 + 2 * row[..., 0] + shift[..., 0].abs()),
        error_ds @ k + last * dq.abs(),
        by_kv_head(error_ds.mT @ q) + last * dk.abs(),
        by_kv_head(error_p.mT @ dout) + last * dv.abs(),
    ]
    if p.sinks is not None:
        p_sink = torch.exp(p.sinks.double()[None, :, None, None] - shift)
        result.append((p_sink * delta * (high * (8 + 4 * row) + low)).sum(dim=(0, 2, 3)))
    return result


def state_bounds(p: Problem, state: State) -> list[Tensor]:
    """The same of (out, lse) that `state` and all keys give: a weight is 2 to a difference from m.

    For a row that sees none lse is a logarithm of one number: good to its last place, rounded once.
    """
    low, high = torch.finfo(p.q.dtype).eps, torch.finfo(state[0].dtype).eps
    groups = p.q.shape[1] // p.k.shape[1]
    q, k, v = (x.double().abs() for x in (p.q, p.k, p.v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    acc, m, l = (x.double() for x in state)  # noqa: E741
    out, lse = reference.finish(after(p, state))
    size = (abs(p.scale) * (q @ k.mT) + p.softcap).masked_fill(~p.visible[:, None], 0.0)
    row = torch.nn.functional.pad(size, (0, 1)).amax(dim=-1, keepdim=True)  # also without keys
    row = row + m.abs().masked_fill(l == 0, 0.0)[..., None]
    s = reference.scores(p.q.double(), p.k.double(), p.scale, p.softcap)
    shift = lse.masked_fill(l + p.visible.any(dim=-1)[:, None] == 0, 0.0)[..., None]
    prob = torch.exp(s - shift).masked_fill(~p.visible[:, None], 0.0)
    before = torch.exp2(m - shift[..., 0] / math.log(2))[..., None] * acc.abs()
    low, exp = (2 * low, 2.8e-6) if low > high else (0.0, 0.0)
    error = (high * (8 + 4 * row) + low) * (prob @ v) + high * (8 + 4 * row) * before
    log_l = torch.log2(l.masked_fill(l == 0, 1.0)) * math.log(2)
    last = torch.finfo(p.q.dtype).eps
    return [
        error + last * out.abs(),
        torch.where(
            p.visible.any(dim=-1)[:, None],
            exp + high * (8 + 2 * row[..., 0] + shift[..., 0].abs()),
            high * (0.51 * lse.abs() + log_l),
        ),
    ]


def assert_matches_reference(p: Problem, got: Sequence[Tensor] | None = None) -> None:
    """Each entry of `got` (a prefix of out, lse, dq, dk, dv, dsinks) is within its bound."""
    exact = theirs(p, torch.float64)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    got = ours(p) if got is None else got
    for name, a, b, bound in zip(names, got, exact, bounds(p, exact), strict=False):
        assert_within(name, a, b, bound)


def assert_within(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Each entry is; infinite ones must match exactly."""
    assert got.shape == exact.shape
    infinite = torch.isinf(exact)
    assert torch.equal(got.double()[infinite], exact[infinite]), name
    difference = (got.double() - exact).masked_fill(infinite, 0.0).abs()
    ratio = (difference / (bound + torch.finfo(got.dtype).tiny)).nan_to_num(nan=math.inf)
    worst = ratio.max().item() if ratio.numel() else 0.0
    assert worst <= 1, f"{name}: error {worst:.3g} times what rounding explains"


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite entries (lse of empty rows) must match exactly."""
    assert got.shape == exact.shape
    infinite = torch.isinf(exact)
    assert torch.equal(got.double()[infinite], exact[infinite])
    difference = (got.double() - exact).masked_fill(infinite, 0.0).abs()
    return difference.nan_to_num(nan=math.inf).max().item() if got.numel() else 0.0


def rms_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).square().mean().sqrt().item()


def ulp(exact: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of the largest entry."""
    finite = exact[torch.isfinite(exact)]
    return torch.finfo(dtype).eps * finite.abs().max().item() if finite.numel() else 0.0
