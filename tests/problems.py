# SPDX-License-Identifier: BSD-3-Clause
"""One attention problem of the operators' tests: ours, the reference's, torch's, block by block."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from conftest import DEVICE, ON_VIRTUAL_GPU
from intervals import Interval, scattered_pairs
from ring_attention import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = list(range(16, 257, 8))
STORAGES = ["bhsd", "bshd", "sbhd", "expanded", "sliced", "strided", "misaligned"]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_low = pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))


def long(length: int, on_virtual_gpu: int) -> int:
    """A length that has to exceed tiles, or what the CPU's kernels cut work into.

    The virtual GPU needs milliseconds for a tile: there the tiles are what has to be exceeded.
    """
    return on_virtual_gpu if ON_VIRTUAL_GPU else length


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
        if x.numel() == 0:  # frombuffer() refuses to read nothing
            return x
        if DEVICE.type == "cuda":  # there a pointer is a multiple of its element's size
            return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        raw = torch.empty(x.numel() * x.element_size() + 1, dtype=torch.uint8)
        view = torch.frombuffer(raw.numpy(), dtype=x.dtype, offset=1, count=x.numel())
        return view.view(x.shape).copy_(x)
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


def any_state(p: Problem) -> State:
    """As earlier keys may have left it: a quarter empty, references far from what scores are."""
    rows, state = p.q.shape[:3], ops.state_dtype(p.q.dtype)
    seen = torch.rand(rows) > 0.25
    m = torch.empty(rows).uniform_(-300, 300).masked_fill(~seen, -math.inf)
    l = torch.exp2(24 * torch.rand(rows)) * seen  # noqa: E741
    acc = torch.randn(*rows, p.v.shape[3]) * l[..., None]
    return acc.to(state), m.to(state), l.to(state)


def after(p: Problem, state: State) -> reference.State:
    """The state, in float64, after all keys."""
    before = reference.State(*(x.double() for x in state))
    q, k, v = (x.double() for x in (p.q, p.k, p.v))
    return reference.fold(before, q, k, v, p.visible, scale=p.scale, softcap=p.softcap)


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
