# SPDX-License-Identifier: BSD-3-Clause
"""The operators against the float64 reference on the same rounded inputs.

Two bounds. The project's: the error of ours is at most twice the error of torch's own attention in
the same dtype (`test_error_is_at_most_twice_torchs`). And one for each single entry, for calls
that torch has no counterpart of: what rounding alone explains (`bounds`). Tests marked `isa` are
run again, in a process of their own, for every instruction set of this machine: `test_isa`.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention as sdpa

from conftest import ON_VIRTUAL_GPU
from ring_attention import ops, reference

OPS = torch.ops.ring_attention
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = list(range(16, 257, 8))
LENGTHS = [0, 1, 7, 113, 203]
STORAGES = ["bhsd", "bshd", "sbhd", "expanded", "sliced", "strided", "misaligned"]
Interval = tuple[Tensor, Tensor]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_low = pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))


def long(length: int, on_virtual_gpu: int) -> int:
    """A length that has to exceed tiles, or what the CPU's kernels cut work into.

    The virtual GPU needs milliseconds for a tile: there the tiles are what has to be exceeded.
    """
    return on_virtual_gpu if ON_VIRTUAL_GPU else length


# --- masks as intervals: int32 [n, batch or 1, q_len] -----------------------------------------


def stacked(*bounds: Sequence[Tensor]) -> Interval:
    begin, end = (torch.stack(list(b)).to(torch.int32) for b in zip(*bounds, strict=True))
    return begin, end


def full(batch: int, q_len: int, k_len: int) -> Interval:
    return stacked((torch.zeros(1, 1).expand(1, q_len), torch.full((1, 1), k_len).expand(1, q_len)))


def causal(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((0 * rows, rows + 1))


def bottom_right(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((0 * rows, rows + 1 + k_len - q_len))


def window(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((rows - 9, rows + 6))


def documents(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    return stacked((rows // 29 * 29, rows // 29 * 29 + 31))


def padded(batch: int, q_len: int, k_len: int) -> Interval:
    lengths = torch.tensor([k_len, k_len // 3])[:batch, None]
    return stacked((0 * lengths.expand(batch, q_len), lengths.expand(batch, q_len)))


def first_and_window(batch: int, q_len: int, k_len: int) -> Interval:
    rows = torch.arange(q_len)[None]
    begin = (rows - 11).clamp(min=0)
    return stacked((0 * rows, begin.clamp(max=4)), (begin.clamp(min=4), rows + 1))


def scattered(batch: int, q_len: int, k_len: int, n: int = 1) -> Interval:
    """n disjoint random intervals per row and sample; about a quarter of the rows see nothing."""
    cuts = torch.randint(-3, k_len + 4, (batch, q_len, 2 * n)).sort(dim=-1).values
    cuts = torch.where(torch.rand(batch, q_len, 1) < 0.25, cuts[..., :1], cuts)
    return stacked(*((cuts[..., 2 * i], cuts[..., 2 * i + 1]) for i in range(n)))


def scattered_pairs(batch: int, q_len: int, k_len: int) -> Interval:
    return scattered(batch, q_len, k_len, n=2)


MASKS: list[Callable[[int, int, int], Interval]] = [
    full,
    causal,
    bottom_right,
    window,
    documents,
    padded,
    first_and_window,
    scattered,
    scattered_pairs,
]
each_mask = pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.__name__)


# --- one attention problem, ours and theirs ---------------------------------------------------


@dataclass
class Problem:
    """Inputs of one call, as rounded to their dtype, and the gradients that come back."""

    q: Tensor
    k: Tensor
    v: Tensor
    begin: Tensor
    end: Tensor
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    dout: Tensor = field(default_factory=lambda: torch.empty(0))
    dlse: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        return reference.visible_keys(self.begin, self.end, self.k.shape[2])

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = [x for x in (self.q, self.k, self.v, self.sinks) if x is not None]
        return [x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]


def problem(
    dtype: torch.dtype,
    mask: Callable[[int, int, int], Interval] = scattered_pairs,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 37,
    k_len: int = 53,
    head_dim: int = 32,
    v_head_dim: int | None = None,
    storage: str = "bhsd",
    sinks: bool = False,
    softcap: float = 0.0,
    scale: float | None = None,
    dlse: bool = True,
) -> Problem:
    v_head_dim = v_head_dim or head_dim
    state = ops.state_dtype(dtype)
    return Problem(
        stored(torch.randn(batch, heads, q_len, head_dim).to(dtype), storage),
        stored(torch.randn(batch, kv_heads, k_len, head_dim).to(dtype), storage),
        stored(torch.randn(batch, kv_heads, k_len, v_head_dim).to(dtype), storage),
        *mask(batch, q_len, k_len),
        scale=scale if scale is not None else head_dim**-0.5,
        softcap=softcap,
        sinks=torch.randn(heads, dtype=state) if sinks else None,
        dout=stored(torch.randn(batch, heads, q_len, v_head_dim).to(dtype), storage),
        dlse=torch.randn(batch, heads, q_len, dtype=state) if dlse else None,
    )


def stored(x: Tensor, storage: str) -> Tensor:
    """The same values (one sample repeated for "expanded") in another memory layout."""
    if storage == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if storage == "sbhd":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if storage == "expanded":
        return x[:1].expand(x.shape)
    if storage == "sliced":
        wide = x.new_full((x.shape[0] + 1, x.shape[1], x.shape[2] + 5, x.shape[3] + 3), math.nan)
        view = wide[1:, :, 2 : 2 + x.shape[2], 3:]
        return view.copy_(x)
    if storage == "strided":
        return x.mT.contiguous().mT
    if storage == "misaligned":
        raw = torch.empty(x.numel() * x.element_size() + 1, dtype=torch.uint8)
        view = torch.frombuffer(raw.numpy(), dtype=x.dtype, offset=1, count=x.numel())
        return view.view(x.shape).copy_(x) if x.numel() else x
    assert storage == "bhsd"
    return x


def ours(p: Problem) -> list[Tensor]:
    """out, lse, dq, dk, dv and dsinks if there are sinks, by the functional operators."""
    leaves = p.leaves()
    sinks = leaves[3] if p.sinks is not None else None
    out, lse = ops.forward(*leaves[:3], p.begin, p.end, sinks, p.scale, p.softcap)
    grads = torch.autograd.grad((out, lse), leaves, (p.dout, dlse_of(p, lse)))
    return [out.detach(), lse.detach(), *grads]


def theirs(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The same by the reference, in `dtype`."""
    leaves = p.leaves(dtype)
    sinks = leaves[3] if p.sinks is not None else None
    out, lse = reference.attention(
        *leaves[:3], p.visible, scale=p.scale, softcap=p.softcap, sinks=sinks
    )
    cotangents = (p.dout.to(dtype), dlse_of(p, lse).to(dtype))
    grads = torch.autograd.grad((out, lse), leaves, cotangents)
    return [out.detach(), lse.detach(), *grads]


def dlse_of(p: Problem, lse: Tensor) -> Tensor:
    return torch.zeros_like(lse) if p.dlse is None else p.dlse


def torchs(p: Problem) -> list[Tensor]:
    """out, dq, dk, dv by scaled_dot_product_attention in the dtype of the inputs.

    It has no rows that see nothing: those see everything, and their dout is zero.
    """
    visible = p.visible[:, None]
    empty = ~visible.any(dim=-1, keepdim=True)
    leaves = p.leaves()[:3]
    groups = p.q.shape[1] // p.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in leaves[1:])
    out = sdpa(leaves[0], k, v, attn_mask=visible | empty, scale=p.scale)
    out = out.masked_fill(empty, 0.0)
    return [out.detach(), *torch.autograd.grad(out, leaves, p.dout)]


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
    # What is too small for the state's dtype may vanish.
    lost = torch.finfo(ops.state_dtype(p.q.dtype)).tiny
    error_p = prob * (high_rel + low) + lost
    slope = 1 - (s / p.softcap) ** 2 if p.softcap else 1.0
    delta = (dout * (prob @ v)).sum(dim=-1, keepdim=True)
    delta = delta + dlse_of(p, lse).double().abs()[..., None]
    size_ds = abs(p.scale) * (dout @ v.mT + delta)
    error_ds = size_ds * (prob * (2 * high_rel + 2 * low * slope) + lost)

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


def assert_matches_reference(p: Problem, got: Sequence[Tensor] | None = None) -> None:
    """Each entry of `got` (a prefix of out, lse, dq, dk, dv, dsinks) is within its bound."""
    exact = theirs(p, torch.float64)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    got = ours(p) if got is None else got
    for name, a, b, bound in zip(names, got, exact, bounds(p, exact), strict=False):
        assert a.shape == b.shape
        infinite = torch.isinf(b)
        assert torch.equal(a.double()[infinite], b[infinite]), name
        difference = (a.double() - b).masked_fill(infinite, 0.0).abs()
        bound = bound + torch.finfo(a.dtype).tiny
        ratio = (difference / bound).nan_to_num(nan=math.inf)
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


# --- the state, block by block ----------------------------------------------------------------


State = tuple[Tensor, Tensor, Tensor]


def new_state(p: Problem) -> State:
    """Memory for a state, filled with what must not be read."""
    dtype = ops.state_dtype(p.q.dtype)
    acc = torch.full((*p.q.shape[:3], p.v.shape[3]), math.nan, dtype=dtype)
    return acc, acc[..., 0].clone(), acc[..., 0].clone()


def new_output(p: Problem) -> tuple[Tensor, Tensor]:
    out = torch.full((*p.q.shape[:3], p.v.shape[3]), math.nan, dtype=p.q.dtype)
    return out, torch.full(p.q.shape[:3], math.nan, dtype=ops.state_dtype(p.q.dtype))


def blocks(p: Problem, cuts: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """K/V cut at `cuts`, with each block's local intervals."""
    edges = [0, *cuts, p.k.shape[2]]
    pairs = list(pairwise(edges))
    return [(p.k[:, :, b:e], p.v[:, :, b:e], p.begin - b, p.end - b) for b, e in pairs]


def fold_(
    p: Problem,
    kv: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    state: State | None = None,
    output: tuple[Tensor, Tensor] | None = None,
    *,
    first: bool = False,
    last: bool = False,
) -> None:
    k, v, begin, end = (list(x) for x in zip(*kv, strict=True)) if kv else ([], [], [], [])
    sinks = p.sinks if first else None
    a, m, l = state or (None, None, None)  # noqa: E741
    out, lse = output or (None, None)
    ops.block_forward_(
        p.q, k, v, begin, end, sinks, a, m, l, out, lse, first, last, p.scale, p.softcap
    )


def folded(p: Problem, groups: Sequence[Sequence[Any]]) -> list[Tensor]:
    """(out, lse) by one block_forward_ call per group of blocks."""
    state, output = new_state(p), new_output(p)
    for i, group in enumerate(groups):
        fold_(p, group, state, output, first=i == 0, last=i == len(groups) - 1)
    return list(output)


# --- accuracy ---------------------------------------------------------------------------------


@pytest.mark.isa
@each_low
@pytest.mark.parametrize(("mask", "head_dim"), [(causal, 128), *((mask, 64) for mask in MASKS)])
def test_error_is_at_most_twice_torchs(mask: Any, head_dim: int, dtype: torch.dtype) -> None:
    p = problem(dtype, mask, q_len=113, k_len=203, head_dim=head_dim, dlse=False)
    out, _, *grads = ours(p)

    def without_lse(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0], *tensors[2:]]

    exact, unfused = (without_lse(theirs(p, d)) for d in (torch.float64, dtype))
    names = ("out", "dq", "dk", "dv")
    for name, got, fused, plain, best in zip(
        names, (out, *grads), torchs(p), unfused, exact, strict=True
    ):
        assert rms_error(got, best) <= 2 * rms_error(fused, best), name
        # The largest of so many errors is a matter of luck too: torch's is that of its fused or, in
        # float32, of its plain attention. Where both are exact to the last place, that is allowed.
        luck = error(plain, best) if dtype == torch.float32 else 0.0
        bound = 2 * max(error(fused, best), luck, ulp(best, dtype))
        assert error(got, best) <= bound, f"{name}: {error(got, best):.3g} > {bound:.3g}"


@pytest.mark.isa
@each_low
def test_many_tiles(dtype: torch.dtype) -> None:
    """Longer than any tile or chunk of the kernels, and no multiple of one."""
    lengths = {"q_len": long(523, 267), "k_len": long(775, 331)}
    assert_matches_reference(
        problem(dtype, first_and_window, batch=1, heads=2, kv_heads=1, head_dim=40, **lengths)
    )


@pytest.mark.isa
@each_low
@each_mask
def test_many_chunks(mask: Any, dtype: torch.dtype) -> None:
    """The backward's pairs of chunks, heads of a group that end within a pass of panels."""
    lengths = {"q_len": long(601, 141), "k_len": long(771, 203)}
    assert_matches_reference(problem(dtype, mask, batch=2, heads=2, kv_heads=1, **lengths))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("q_len", [1, 3, 70])
def test_few_queries_against_many_keys(q_len: int, dtype: torch.dtype) -> None:
    """Keys split into parts, whose states are combined; alone and carried from fold to fold."""
    k_len = long(4500, 1300)
    p = problem(dtype, bottom_right, q_len=q_len, k_len=k_len, head_dim=40, sinks=True)
    assert_matches_reference(p)
    kv = blocks(p, (k_len // 2, k_len // 2 + 3))
    for groups in ([kv], [kv[:1], kv[1:]], [kv[:2], kv[2:], []]):
        assert_matches_reference(p, folded(p, groups))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """Of few rows, which CUDA has a tile for, and of more."""
    for q_len in (9, 19):
        assert_matches_reference(
            problem(dtype, batch=1, heads=2, kv_heads=1, q_len=q_len, k_len=21, head_dim=head_dim)
        )


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [(16, 256), (192, 128), (40, 72), (72, 40), (256, 16), (576 // 8, 64)],
)
def test_v_head_dim_differs(head_dim: int, v_head_dim: int, dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, head_dim=head_dim, v_head_dim=v_head_dim))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("q_len", LENGTHS)
@pytest.mark.parametrize("k_len", LENGTHS)
def test_lengths(q_len: int, k_len: int, dtype: torch.dtype) -> None:
    mask = bottom_right if q_len != k_len else causal
    assert_matches_reference(
        problem(dtype, mask, batch=1, heads=2, kv_heads=1, q_len=q_len, k_len=k_len, head_dim=24)
    )


def test_no_samples() -> None:
    p = problem(torch.float32, full, batch=0, sinks=True)
    results = ours(p)
    assert [x.shape[0] for x in results[:5]] == [0] * 5
    assert torch.equal(results[5], torch.zeros(4))
    assert folded(p, [[], blocks(p, (10,))])[0].shape == (0, 4, 37, 32)


@each_dtype
@each_mask
def test_masks(mask: Any, dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, mask, q_len=67, k_len=61, sinks=True))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (6, 1), (8, 2)], ids=str)
def test_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, heads=heads[0], kv_heads=heads[1]))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("softcap", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_scale_sinks(softcap: float, sinks: bool, dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, softcap=softcap, sinks=sinks, scale=-0.4))


def test_sinks_of_minus_infinity_are_none() -> None:
    p = problem(torch.float32, sinks=True)
    assert p.sinks is not None
    p.sinks[1:3] = -math.inf
    assert_matches_reference(p)
    bare = ours(replace(p, sinks=None))
    for a, b in zip(ours(p)[:2], bare[:2], strict=True):
        assert torch.equal(a[:, 1:3], b[:, 1:3])


@each_dtype
@pytest.mark.parametrize("storage", STORAGES)
def test_memory_layouts(storage: str, dtype: torch.dtype) -> None:
    p = problem(dtype, storage=storage, sinks=True)
    assert_matches_reference(p)
    dense = replace(p, **{x: getattr(p, x).contiguous().clone() for x in ("q", "k", "v", "dout")})
    for a, b in zip(ours(p), ours(dense), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("storage", "order"),
    [("bhsd", (0, 1, 2)), ("bshd", (0, 2, 1)), ("sbhd", (2, 0, 1)), ("expanded", (0, 1, 2))],
)
def test_out_has_the_dimension_order_of_q(storage: str, order: tuple[int, ...]) -> None:
    p = problem(torch.bfloat16, storage=storage, v_head_dim=48)
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    assert out.permute(*order, 3).is_contiguous() and lse.is_contiguous()
    meta = [x.to("meta") for x in (p.q, p.k, p.v, p.begin, p.end)]
    meta[0] = torch.empty_strided(p.q.shape, p.q.stride(), dtype=p.q.dtype, device="meta")
    fake, fake_lse = ops.forward(*meta, None, p.scale)
    assert (fake.stride(), fake.dtype) == (out.stride(), out.dtype)
    assert (fake_lse.stride(), fake_lse.dtype) == (lse.stride(), lse.dtype)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^25 elements apart: only their pages are ever touched."""
    p = problem(torch.bfloat16, full, batch=1, heads=1, kv_heads=1, q_len=70, k_len=75)
    try:
        memory = torch.empty(75 * 2**25, dtype=torch.bfloat16)
    except RuntimeError as refused:
        pytest.skip(f"no 5 GiB of address space: {refused}")
    far = {}
    for i, name in enumerate(("q", "k", "v", "dout")):
        x = getattr(p, name)
        strides = (0, 0, 2**25, 1)
        far[name] = memory.as_strided(x.shape, strides, storage_offset=i * 64).copy_(x)
    for a, b in zip(ours(replace(p, **far)), ours(p), strict=True):
        assert torch.equal(a, b)


# --- rows and keys that do not count ----------------------------------------------------------


@pytest.mark.isa
@each_dtype
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered)
    empty = ~p.visible.any(dim=-1)
    assert 0 < empty.sum() < empty.numel()
    out, lse, dq, _, _ = ours(p)
    assert (out.transpose(1, 2)[empty] == 0).all()
    assert (lse.transpose(1, 2)[empty] == -math.inf).all()
    assert (dq.transpose(1, 2)[empty] == 0).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_keys_no_row_sees_do_not_count(garbage: float, dtype: torch.dtype) -> None:
    q_len, k_len = 41, 137
    rows = torch.arange(q_len)[None]
    # Two stretches with a gap, unseen keys on both sides.
    begin, end = stacked((3 + rows // 2, 20 + rows // 2), (70 + rows, 90 + rows))
    p = problem(dtype, lambda *_: (begin, end), q_len=q_len, k_len=k_len)
    unseen = ~p.visible.any(dim=1)[0]
    assert unseen.sum() > 30 and unseen[0] and unseen[60] and unseen[-1]
    clean, dirty = {}, {}
    for name in ("k", "v"):
        x = getattr(p, name)
        clean[name] = x.masked_fill(unseen[None, None, :, None], 0.0)
        dirty[name] = x.masked_fill(unseen[None, None, :, None], garbage)
    expected = ours(replace(p, **clean))
    for a, b in zip(ours(replace(p, **dirty)), expected, strict=True):
        assert torch.equal(a, b)
    assert (expected[3][:, :, unseen] == 0).all() and (expected[4][:, :, unseen] == 0).all()


@pytest.mark.isa
@each_low
@each_mask
def test_influence(mask: Any, dtype: torch.dtype) -> None:
    """Changing a key changes the rows that see it, and not a bit of the others."""
    p = problem(dtype, mask, q_len=45, k_len=71)
    before = ours(p)
    for j in (5, 44) if ON_VIRTUAL_GPU else (0, 5, 33, 44, 70):
        k, v = p.k.clone(), p.v.clone()
        k[:, :, j], v[:, :, j] = -100 * k[:, :, j], 1000 + v[:, :, j]
        after = ours(replace(p, k=k, v=v))
        sees = p.visible[:, :, j].expand(2, -1)
        for name, a, b in zip(("out", "lse", "dq"), before, after, strict=False):
            same = (a == b).reshape(2, 4, 45, -1).all(dim=-1).transpose(1, 2)
            assert same[~sees].all(), f"{name} of a row that does not see key {j} changed"
            if name == "out":
                assert not same[sees].any(), f"a row that sees key {j} did not change"
        # Keys seen by no row that sees j keep their gradients, too.
        apart = ~(p.visible & sees[..., None]).any(dim=1)
        for a, b in zip(before[3:5], after[3:5], strict=True):
            assert torch.equal(a.transpose(1, 2)[apart], b.transpose(1, 2)[apart])


@pytest.mark.isa
@each_low
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Not on what they see, nor on whether their scores make a tile fold twice."""
    p = problem(dtype, scattered, batch=1, heads=1, kv_heads=1, q_len=64, k_len=300, scale=1.0)
    alone = ours(p)
    others = torch.arange(64) % 3 != 0
    begin, end = scattered(1, 64, 300)
    q = p.q.clone()
    q[:, :, others] *= 40
    together = ours(
        replace(
            p,
            q=q,
            begin=torch.where(others, begin, p.begin),
            end=torch.where(others, end, p.end),
        )
    )
    for a, b in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(a[:, :, ~others], b[:, :, ~others])


@pytest.mark.isa
@each_dtype
def test_scratch_of_earlier_calls_does_not_matter(dtype: torch.dtype) -> None:
    p = problem(dtype, padded, q_len=75, k_len=131, head_dim=72)
    before = ours(p)
    nan = problem(dtype, full, q_len=long(300, 140), k_len=long(300, 140), head_dim=136)
    ours(replace(nan, q=torch.full_like(nan.q, math.nan), v=torch.full_like(nan.v, math.nan)))
    for a, b in zip(before, ours(p), strict=True):
        assert torch.equal(a, b)


@pytest.mark.isa
@each_dtype
def test_bounds_are_clamped(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered_pairs)
    limit = torch.iinfo(torch.int32)
    begin = torch.where(p.begin <= 0, limit.min, p.begin).to(torch.int32)
    end = torch.where(p.end >= p.k.shape[2], limit.max, p.end).to(torch.int32)
    # Empty rows in every spelling.
    empty = p.begin[1] >= p.end[1]
    begin[1] = torch.where(empty, limit.max, begin[1])
    end[1] = torch.where(empty, limit.min, end[1])
    assert empty.any()
    for a, b in zip(ours(replace(p, begin=begin, end=end)), ours(p), strict=True):
        assert torch.equal(a, b)


# --- extreme values ---------------------------------------------------------------------------


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("sign", [1, -1])
def test_rising_and_falling_scores(sign: int, dtype: torch.dtype) -> None:
    """Every key beats all before it: a running maximum must move, and old weight must vanish."""
    p = problem(dtype, causal, q_len=150, k_len=150, scale=1.0, heads=2, kv_heads=2)
    rise = torch.linspace(0, 60, 150) * sign
    p.q[...] = 0.125
    p.k[...] = (rise[:, None] * 8 / 32).to(dtype)
    assert_matches_reference(p)


@pytest.mark.isa
@each_dtype
def test_peaked_softmax(dtype: torch.dtype) -> None:
    p = problem(dtype, full, q_len=33, k_len=129, scale=50.0, dlse=False)
    assert_matches_reference(p)
    assert (ours(p)[1] > 500).any()


@pytest.mark.isa
@each_low
def test_values_near_the_largest(dtype: torch.dtype) -> None:
    """The state is unnormalised, up to 2^24 times the output, and may not overflow."""
    p = problem(dtype, causal, q_len=113, k_len=113, dlse=False)
    largest = 65000.0 if dtype == torch.float16 else 1e28
    p.v.copy_(p.v.sign() * largest)
    p.dout.copy_(p.dout / largest if dtype != torch.float16 else p.dout / 64)
    assert_matches_reference(p)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_huge_scores(size: float, dtype: torch.dtype) -> None:
    """Scores whose neighbours in floating point are further apart than any exponent reaches."""
    p = problem(dtype, causal, q_len=70, k_len=70, dlse=False)
    size = min(size, 1e4 if dtype == torch.float16 else size)
    p.q.mul_(size), p.k.mul_(size)
    out, _, *gradients = ours(p)
    assert torch.isfinite(out).all() and all(torch.isfinite(x).all() for x in gradients)
    # One key has all the weight: powers of two, whose products and sums are exact.
    p.q.copy_(size), p.k.copy_(size)
    p.k[:, :, 5:] *= 2
    p.k[:, :, 9:] *= 2
    out, lse, *_ = ours(p)
    v = p.v.repeat_interleave(2, dim=1)
    assert torch.equal(out[:, :, 9], v[:, :, 9]) and torch.equal(out[:, :, 5], v[:, :, 5])
    assert torch.isfinite(lse).all()


@pytest.mark.isa
@each_dtype
def test_large_sinks(dtype: torch.dtype) -> None:
    p = problem(dtype, sinks=True)
    assert p.sinks is not None
    p.sinks.copy_(torch.tensor([80.0, -80.0, 1e4, -1e4]))
    assert_matches_reference(p)


# --- folding ----------------------------------------------------------------------------------


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_in_one_call_or_in_many(sinks: bool, dtype: torch.dtype) -> None:
    p = problem(dtype, q_len=45, k_len=203, sinks=sinks)
    kv = blocks(p, (60, 60, 113, 130))
    for groups in ([kv], [[b] for b in kv], [kv[:2], kv[2:]], [[], kv, []], [kv[:1], [], kv[1:]]):
        assert_matches_reference(p, folded(p, groups))


@pytest.mark.isa
def test_error_does_not_grow_with_folds() -> None:
    p = problem(torch.float32, causal, q_len=192, k_len=192, head_dim=64)
    exact = theirs(p, torch.float64)
    whole = folded(p, [blocks(p, ())])
    for many in (8, 64):
        cuts = [192 * i // many for i in range(1, many)]
        got = folded(p, [[b] for b in blocks(p, cuts)])
        for a, b, c in zip(got, whole, exact, strict=False):
            assert error(a, c) <= 2 * max(error(b, c), ulp(c, torch.float32))


@pytest.mark.isa
@each_dtype
def test_finish_is_the_last_fold(dtype: torch.dtype) -> None:
    p = problem(dtype, sinks=True)
    kv = blocks(p, (20,))
    by_last = folded(p, [kv[:1], kv[1:]])
    state, output = new_state(p), new_output(p)
    fold_(p, kv[:1], state, first=True)
    fold_(p, kv[1:], state)
    kept = [x.clone() for x in state]
    ops.finish_(*state, *output)
    for a, b in zip(output, by_last, strict=True):
        assert error(a, b.double()) <= ulp(b.double(), b.dtype)
    for a, b in zip(state, kept, strict=True):
        assert torch.equal(a, b)
    # The last fold writes out and lse, not the state.
    fold_(p, [], state, output, last=True)
    for a, b in zip(state, kept, strict=True):
        assert torch.equal(a, b)
    # Any strides of out.
    spread = torch.full((2, 37, 4, 40), 7.0, dtype=dtype).transpose(1, 2)[..., 4:36]
    ops.finish_(*kept, spread, output[1])
    assert torch.equal(spread, output[0])
    assert (spread._base is not None) and (spread._base[..., :4] == 7).all()


@pytest.mark.isa
@each_dtype
def test_combine_joins_split_keys(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered, k_len=101)
    kv = blocks(p, (40,))
    halves = [new_state(p), new_state(p)]
    for i, state in enumerate(halves):
        fold_(p, kv[i : i + 1], state, first=True)
    kept = [x.clone() for x in halves[1]]
    ops.combine_(*halves[0], *halves[1])
    output = new_output(p)
    ops.finish_(*halves[0], *output)
    for a, b in zip(halves[1], kept, strict=True):
        assert torch.equal(a, b)
    assert_matches_reference(p, output)


def test_combining_with_an_empty_state_changes_nothing() -> None:
    p = problem(torch.float32, scattered)
    state, empty = new_state(p), new_state(p)
    fold_(p, blocks(p, ()), state, first=True)
    fold_(p, [], empty, first=True)
    assert (empty[2] == 0).all()
    expected = [x.clone() for x in state]
    ops.combine_(*state, *empty)
    ops.combine_(*empty, *state)
    assert (expected[2] == 0).any()
    seen = expected[2] > 0
    for a, b, c in zip(state, empty, expected, strict=True):
        assert torch.equal(a[seen], c[seen]) and torch.equal(b[seen], c[seen])
    assert (state[2][~seen] == 0).all() and (empty[2][~seen] == 0).all()


def test_state_is_the_references() -> None:
    """m is a lazy maximum in log2 units, and (acc, l) are relative to it: Note [state]."""
    p = problem(torch.float32, scattered, sinks=True)
    p.k.mul_(8)
    state = new_state(p)
    fold_(p, blocks(p, ()), state, first=True)
    exact = reference.initial_state(p.q.double(), 32, p.sinks)
    q, k, v = p.q.double(), p.k.double(), p.v.double()
    exact = reference.fold(exact, q, k, v, p.visible, scale=p.scale)
    assert (state[1] <= exact.m + 1e-4).all() and (state[1] >= exact.m - 24.001).all()
    shift = torch.exp2(state[1].double() - exact.m)
    torch.testing.assert_close(state[2].double() * shift, exact.l, rtol=1e-5, atol=0)
    torch.testing.assert_close(state[0] * shift[..., None], exact.acc, rtol=1e-4, atol=1e-5)


# --- backward by blocks -----------------------------------------------------------------------


def gradients(p: Problem, groups: Sequence[Sequence[Any]]) -> list[Tensor]:
    """dq, dk, dv in the state dtype by one block_backward_ call per group."""
    dtype = ops.state_dtype(p.q.dtype)
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale, p.softcap)
    delta = ops.delta(out, p.dout, p.dlse)
    dq = torch.zeros(p.q.shape, dtype=dtype)
    dks, dvs = [], []
    for group in groups:
        k, v, begin, end = (list(x) for x in zip(*group, strict=True)) if group else ([],) * 4
        dk, dv = ([torch.zeros(x.shape, dtype=dtype) for x in xs] for xs in (k, v))
        ops.block_backward_(
            p.q, p.dout, lse, delta, k, v, begin, end, dq, dk, dv, p.scale, p.softcap
        )
        dks += dk
        dvs += dv
    return [dq, torch.cat(dks, dim=2), torch.cat(dvs, dim=2)]


@pytest.mark.isa
@each_dtype
def test_gradients_add_up_over_blocks(dtype: torch.dtype) -> None:
    p = problem(dtype, q_len=45, k_len=203, softcap=5.0, sinks=True)
    kv = blocks(p, (60, 60, 113, 130))
    for groups in ([kv], [[b] for b in kv], [kv[:2], [], kv[2:]]):
        assert_matches_reference(p, [*ours(p)[:2], *gradients(p, groups)])


@pytest.mark.isa
@each_dtype
def test_gradients_are_added_to_what_is_there(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered)
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    grads = [torch.randn(x.shape, dtype=lse.dtype) for x in (p.q, p.k, p.v)]
    before = [x.clone() for x in grads]
    dq, dk, dv = grads
    ops.block_backward_(
        p.q, p.dout, lse, ops.delta(out, p.dout, p.dlse), [p.k], [p.v], [p.begin], [p.end],
        dq, [dk], [dv], p.scale,
    )  # fmt: skip
    for a, b, c in zip(grads, before, gradients(p, [blocks(p, ())]), strict=True):
        torch.testing.assert_close(a, b + c)
        assert torch.equal(a[c == 0], b[c == 0])


def test_delta() -> None:
    p = problem(torch.bfloat16, storage="bshd")
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    exact = (out.double() * p.dout.double()).sum(dim=-1)
    assert error(ops.delta(out, p.dout), exact) <= 4 * ulp(exact, torch.float32)
    expanded = torch.randn(2, 4, 1).expand(lse.shape)
    for dlse in (p.dlse, expanded):
        assert dlse is not None
        best = exact - dlse
        assert error(ops.delta(out, p.dout, dlse), best) <= 4 * ulp(best, torch.float32)


def test_sink_gradient_is_the_operators() -> None:
    p = problem(torch.float32, sinks=True)
    assert p.sinks is not None
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale)
    assert torch.equal(ops.sink_gradient(p.sinks, lse, ops.delta(out, p.dout, p.dlse)), ours(p)[5])


# --- invariants -------------------------------------------------------------------------------


@pytest.mark.isa
@each_dtype
@each_mask
def test_invariants(mask: Any, dtype: torch.dtype) -> None:
    """sum dv = sum dout over rows that see a key; sum <q, dq> = sum <k, dk> per K/V head.

    The first holds because the weights of a row sum to one (no sink), the second because scores
    depend on q and k through q.k alone. Summed in float64, with the rounding of each gradient as
    the bound.
    """
    p = problem(dtype, mask, q_len=83, k_len=91, softcap=4.0)
    _, _, dq, dk, dv = (x.double() for x in ours(p))
    seen = p.visible.any(dim=-1).expand(2, -1)[:, None, :, None]
    dout = p.dout.double().masked_fill(~seen, 0.0)
    by_head = dout.unflatten(1, (2, 2)).sum(dim=(2, 3))
    eps = torch.finfo(dtype).eps
    slack = eps * (dv.abs().sum(dim=2) + dout.abs().unflatten(1, (2, 2)).sum(dim=(2, 3)))
    assert ((dv.sum(dim=2) - by_head).abs() <= slack).all()
    qdq, kdk = p.q.double() * dq, p.k.double() * dk
    difference = qdq.unflatten(1, (2, 2)).sum(dim=(2, 3, 4)) - kdk.sum(dim=(2, 3))
    slack = eps * (qdq.abs().unflatten(1, (2, 2)).sum(dim=(2, 3, 4)) + kdk.abs().sum(dim=(2, 3)))
    assert (difference.abs() <= slack).all()
    assert (dq.abs().amax(dim=(2, 3)) > 0).all() and (dv.abs().amax(dim=(2, 3)) > 0).all()


@pytest.mark.isa
@each_dtype
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths = {"q_len": long(531, 150), "k_len": long(1100, 300)}
    p = problem(dtype, first_and_window, batch=1, sinks=True, **lengths)
    cut = [[b] for b in blocks(p, (lengths["k_len"] // 3, lengths["k_len"] // 3 + 11))]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2) if ON_VIRTUAL_GPU else (1, 2, 3, 1, 3):
            torch.set_num_threads(count)
            results.append([*ours(p), *folded(p, cut), *gradients(p, cut)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


# --- hypothesis -------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, list[int]]:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kv_heads = draw(st.integers(1, 3))
    k_len = draw(st.integers(0, 90))
    p = problem(
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(MASKS)),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=draw(st.integers(0, 90)),
        k_len=k_len,
        head_dim=draw(st.sampled_from(HEAD_DIMS[:16])),
        v_head_dim=draw(st.sampled_from(HEAD_DIMS[:16])),
        storage=draw(st.sampled_from(STORAGES)),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        dlse=draw(st.booleans()),
    )
    cuts = sorted(draw(st.lists(st.integers(0, k_len), max_size=3)))
    return p, cuts


@pytest.mark.isa
@given(problems())
@settings(max_examples=long(60, 15))
def test_any_problem(drawn: tuple[Problem, list[int]]) -> None:
    p, cuts = drawn
    assert_matches_reference(p)
    kv = [[b] for b in blocks(p, cuts)]
    assert_matches_reference(p, [*folded(p, kv), *gradients(p, kv)])


# --- autograd, fakes, the compiler ------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Problem:
    return problem(dtype, batch=1, heads=2, kv_heads=1, q_len=5, k_len=6, head_dim=16, **kwargs)


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck_forward(sinks: bool) -> None:
    p = small(sinks=sinks, storage="bshd")
    leaves = p.leaves()
    args = (*leaves[:3], p.begin, p.end, leaves[3] if sinks else None, p.scale, 0.0)
    opcheck(OPS.forward.default, args)


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck_backward(sinks: bool) -> None:
    p = small(torch.bfloat16, sinks=sinks, dlse=sinks)
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale)
    args = (p.dout, p.dlse, p.q, p.k, p.v, out, lse, p.begin, p.end, p.sinks, p.scale, 0.0)
    opcheck(OPS.backward.default, args)


def in_place_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    p = small(sinks=True)
    state, (out, lse) = new_state(p), new_output(p)
    kv = blocks(p, (2,))
    lists = tuple(list(x) for x in zip(*kv, strict=True))
    fold_(p, kv, state, (out, lse), first=True)
    other = tuple(x.clone() for x in state)
    ops.finish_(*state, out, lse)
    yield (
        OPS.block_forward_.default,
        (p.q, *lists, p.sinks, None, None, None, out, lse, True, True, p.scale, 0.0),
    )
    yield (
        OPS.block_forward_.default,
        (p.q, *lists, None, *state, None, None, False, False, p.scale, 0.0),
    )
    delta = ops.delta(out, p.dout)
    grads = [[torch.zeros_like(x) for x in xs] for xs in lists[:2]]
    yield (
        OPS.block_backward_.default,
        (p.q, p.dout, lse, delta, *lists, torch.zeros_like(p.q), *grads, p.scale, 0.0),
    )
    yield OPS.combine_.default, (*state, *other)
    yield OPS.finish_.default, (*state, out, lse)
    yield OPS.delta.default, (out, p.dout, None)
    yield OPS.sink_gradient.default, (p.sinks, lse, delta)


@pytest.mark.parametrize("index", range(7))
def test_opcheck_the_others(index: int) -> None:
    op, args = list(in_place_calls())[index]
    opcheck(op, args)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap: float, sinks: bool) -> None:
    p = small(torch.float64, softcap=softcap, sinks=sinks)
    p.begin[:, :, 2] = p.end[:, :, 2] = 0

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
        out, lse = ops.forward(q, k, v, p.begin, p.end, sinks, p.scale, softcap)
        return out, lse[torch.isfinite(lse)]

    assert torch.autograd.gradcheck(call, p.leaves(), atol=1e-6)


def test_gradients_of_one_output_alone() -> None:
    p = problem(torch.float32)
    for which in (0, 1):
        leaves = p.leaves()
        outputs = ops.forward(*leaves, p.begin, p.end, None, p.scale)
        rows = outputs[which][torch.isfinite(outputs[which])]
        got = torch.autograd.grad(rows.sum(), leaves)  # expanded, scalar cotangent
        exact = p.leaves(torch.float64)
        outputs = reference.attention(*exact, p.visible, scale=p.scale)
        rows = outputs[which][torch.isfinite(outputs[which])]
        expected = torch.autograd.grad(rows.sum(), exact, allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            best = torch.zeros_like(a).double() if b is None else b
            assert error(a, best) <= 8 * ulp(best, torch.float32) + 1e-9


def test_expanded_dout() -> None:
    p = problem(torch.bfloat16, full)
    leaves = p.leaves()
    out, _ = ops.forward(*leaves, p.begin, p.end, None, p.scale)
    got = torch.autograd.grad(out.sum(), leaves)
    out, _ = ops.forward(*leaves, p.begin, p.end, None, p.scale)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_double_backward_raises() -> None:
    p = small()
    leaves = p.leaves()
    out, _ = ops.forward(*leaves, p.begin, p.end, None, p.scale)
    (dq,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"ring_attention\.backward: .*double backward"):
        dq.sum().backward()


def test_local_ops_refuse_tensors_that_require_grad() -> None:
    p = small(sinks=True)
    kv = blocks(p, ())
    state, output = new_state(p), new_output(p)
    fold_(p, kv, state, output, first=True, last=True)
    delta = ops.delta(output[0], p.dout)
    trained = replace(p, q=p.q.clone().requires_grad_())
    keys = [(p.k.clone().requires_grad_(), *kv[0][1:])]
    out = output[0].clone().requires_grad_()
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("q", lambda: fold_(trained, kv, state, first=True)),
        ("k", lambda: fold_(p, keys, state, first=True)),
        ("acc", lambda: ops.combine_(state[0].clone().requires_grad_(), *state[1:], *state)),
        ("out", lambda: ops.finish_(*state, out, output[1])),
        ("dout", lambda: ops.delta(output[0], p.dout.clone().requires_grad_())),
        ("delta", lambda: ops.sink_gradient(p.sinks, output[1], delta.clone().requires_grad_())),
    ]
    for name, call in refused:
        with pytest.raises(RuntimeError, match=f"requires grad, got {name};"):
            call()
        with torch.no_grad():
            call()


def test_autograd_notices_written_tensors() -> None:
    p = small()
    state, output = new_state(p), new_output(p)
    weight = torch.ones_like(output[0], requires_grad=True)
    product = weight * output[0]  # saves output[0]
    fold_(p, blocks(p, ()), state, output, first=True, last=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        fold_(p, blocks(p, ()), new_state(p), new_output(p), first=True, last=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()

    # Nothing but views around the op: inductor would spend half a minute compiling the rest.
    def model(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
        out, lse = ops.forward(q, k, v, *mask, sinks, 0.3, 5.0)
        return out.transpose(1, 2).flatten(2), lse

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for length in (9, 14, 21):
        p = problem(torch.float32, causal, q_len=length, k_len=length, storage="bshd", sinks=True)
        dout = p.dout.transpose(1, 2).flatten(2)
        results = []
        for function in (model, compiled):
            leaves = p.leaves()
            outputs = function(*leaves, p.begin, p.end)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, (dout, p.dlse))])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    assert graphs["unique_graphs"] == 1


def test_compile_in_place_ops() -> None:
    torch._dynamo.reset()

    def model(p: Problem) -> list[Tensor]:
        return folded(p, [[b] for b in blocks(p, (3,))])

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    p = small(sinks=True)
    for a, b in zip(compiled(p), model(p), strict=True):
        assert torch.equal(a, b)


# --- instruction sets -------------------------------------------------------------------------


def run_python(*args: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RING_ATTENTION_CPU": isa}
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.isa
def test_the_forced_isa_is_used() -> None:
    assert ops.isa_name() == os.environ.get("RING_ATTENTION_CPU", ops.isa_name())
    assert ops.isa_name() in ops.isa_names()


@pytest.mark.parametrize("isa", [name for name in ops.isa_names() if name != ops.isa_name()])
def test_isa(isa: str) -> None:
    """Every test marked `isa`, again."""
    result = run_python(
        "-m", "pytest", "-x", "-m", "isa", "-p", "no:cacheprovider", __file__, isa=isa
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "passed" in result.stdout


def test_an_unknown_isa_is_refused() -> None:
    code = "from ring_attention import ops; ops.isa_name()"
    result = run_python("-c", code, isa="abacus")
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert "RING_ATTENTION_CPU" in message and "abacus" in message
    assert all(name in message for name in ops.isa_names())


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    source = Path(ops.__file__).parent
    package = tmp_path / "ring_attention"
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_text(file.read_text())
    (package / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ring_attention.ops"
    result = run_python("-P", "-c", code, isa="")
    assert result.returncode != 0
    assert "ImportError: ring_attention: expected" in result.stderr
    assert "pip install ." in result.stderr
