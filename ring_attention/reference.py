# SPDX-License-Identifier: BSD-3-Clause
"""The mathematics of ring_attention in plain torch: slow, exact, readable.

Everything the kernels compute is stated here once, in the dtype of its inputs (use float64 for an
oracle): attention as one differentiable expression, the running state that lets blocks of keys be
folded in one at a time, and the backward pass written out. Sources: Milakov & Gimelshein, "Online
normalizer calculation for softmax" (2018) for the state; Dao et al., "FlashAttention" (2022),
section 3.1 and appendix B for the backward; Liu et al., "Ring Attention with Blockwise
Transformers" (2023) for folding blocks that arrive over a ring.

Shapes everywhere: q [batch, heads, q_len, head_dim], k [batch, kv_heads, k_len, head_dim],
v [batch, kv_heads, k_len, v_head_dim], visible [batch or 1, q_len, k_len] bool, sinks [heads];
heads is a multiple of kv_heads, and query head h reads K/V head h // (heads // kv_heads).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def visible_keys(key_begin: Tensor, key_end: Tensor, k_len: int) -> Tensor:
    """The dense mask of interval bounds: row i sees key j iff some interval n contains j.

    Args:
        key_begin: int32 [n, batch or 1, q_len], first key of each half-open interval.
        key_end: int32 [n, batch or 1, q_len], one past the last key; bounds may lie outside
            [0, k_len], and an interval with begin >= end is empty.
        k_len: number of keys.

    Returns:
        bool [batch or 1, q_len, k_len].
    """
    keys = torch.arange(k_len, device=key_begin.device)
    return ((key_begin[..., None] <= keys) & (keys < key_end[..., None])).any(dim=0)


def scores(q: Tensor, k: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """s = u, or softcap * tanh(u / softcap), for u = scale * q.k; [batch, heads, q_len, k_len]."""
    u = scale * (q @ _per_query_head(k, q).mT)
    return softcap * torch.tanh(u / softcap) if softcap else u


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible keys; differentiable by autograd.

    A row that sees no key and has no sink gets out = 0, lse = -inf and zero gradients. A sink is
    one more score of its head's rows whose value is zero; a sink of -inf is none.

    Args:
        q: [batch, heads, q_len, head_dim].
        k: [batch, kv_heads, k_len, head_dim].
        v: [batch, kv_heads, k_len, v_head_dim].
        visible: bool [batch or 1, q_len, k_len], the same for all heads.
        scale: factor of q.k, 1 / sqrt(head_dim) if None.
        softcap: bound of the scores, see `scores`; 0 is none.
        sinks: [heads], natural-log units.

    Returns:
        out [batch, heads, q_len, v_head_dim] and lse [batch, heads, q_len], the natural logarithm
        of the sum of exponentials, sink included.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 5, 16, dtype=torch.float64) for _ in range(3))
        >>> out, lse = attention(q, k, v, torch.ones(1, 5, 5, dtype=torch.bool).tril())
    """
    s = scores(q, k, _scale(q, scale), softcap).masked_fill(~visible[:, None], -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], dim=-1)
    if s.shape[-1] == 0:
        s = torch.nn.functional.pad(s, (0, 1), value=-math.inf)
    # Any finite m gives the same result: it only keeps exp in range, so it is no part of the graph.
    m = s.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)
    p = torch.exp(s - m)
    l = p.sum(dim=-1, keepdim=True)  # noqa: E741
    seen = l > 0
    divisor = torch.where(seen, l, 1.0)
    out = p[..., : k.shape[2]] @ _per_query_head(v, q) / divisor
    lse = torch.where(seen, m + torch.log(divisor), -math.inf).squeeze(-1)
    return out, lse


class State(NamedTuple):
    """What a query knows after some of its keys: Note [state] in csrc/params.h.

    Attributes:
        acc: [batch, heads, q_len, v_head_dim], sum of p v over the keys seen so far.
        m: [batch, heads, q_len], reference exponent in log2 units: p = exp2(s log2(e) - m).
        l: [batch, heads, q_len], sum of p; 0 means that no key was seen.
    """

    acc: Tensor
    m: Tensor
    l: Tensor  # noqa: E741


def initial_state(q: Tensor, v_head_dim: int, sinks: Tensor | None = None) -> State:
    """The state before the first key: empty, or one key per row with score sink and value 0."""
    acc = q.new_zeros(*q.shape[:3], v_head_dim)
    if sinks is None:
        return State(acc, q.new_full(q.shape[:3], -math.inf), q.new_zeros(q.shape[:3]))
    m = (sinks * LOG2_E)[None, :, None].expand(q.shape[:3])
    return State(acc, m.clone(), (m > -math.inf).to(q.dtype))


def fold(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> State:
    """The state after one more block of keys; arguments as in `attention`."""
    s = scores(q, k, _scale(q, scale), softcap).masked_fill(~visible[:, None], -math.inf) * LOG2_E
    m = s.amax(dim=-1) if k.shape[2] else torch.full_like(state.m, -math.inf)
    p = torch.exp2(s - _finite(m)[..., None])
    return combine(state, State(p @ _per_query_head(v, q), m, p.sum(dim=-1)))


def combine(a: State, b: State) -> State:
    """The state of a query that saw the keys of both; commutative, up to rounding associative."""
    m = torch.maximum(a.m, b.m)
    # Two empty states: (-inf) - (-inf) would be NaN.
    scale_a, scale_b = torch.exp2(a.m - _finite(m)), torch.exp2(b.m - _finite(m))
    acc = a.acc * scale_a[..., None] + b.acc * scale_b[..., None]
    return State(acc, m, a.l * scale_a + b.l * scale_b)


def finish(state: State) -> tuple[Tensor, Tensor]:
    """(out, lse) of a state: out = acc / l, lse = ln(2) (m + log2 l); 0 and -inf if empty."""
    seen = state.l > 0
    divisor = torch.where(seen, state.l, 1.0)
    lse = torch.where(seen, (state.m + torch.log2(divisor)) / LOG2_E, -math.inf)
    return state.acc / divisor[..., None], lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `attention`, written out.

    With p = exp(s - lse) and delta = rowsum(dout * out) - dlse:
    dv = p^T dout;  ds = p (dout v^T - delta), times 1 - tanh^2(u / softcap) under softcap;
    dq = scale ds k;  dk = scale ds^T q;  dsinks = -sum exp(sink - lse) delta.
    p and ds need only lse, so every block of keys can be visited alone, in any order.

    Args:
        dout: gradient of out, [batch, heads, q_len, v_head_dim].
        dlse: gradient of lse, [batch, heads, q_len], or None for zero.
        q, k, v, visible, scale, softcap, sinks: as given to `attention`.
        out, lse: as returned by `attention`.

    Returns:
        dq, dk, dv shaped like q, k, v, and dsinks [heads], None without sinks.
    """
    scale = _scale(q, scale)
    delta = (dout * out).sum(dim=-1)
    if dlse is not None:
        delta = delta - dlse
    s = scores(q, k, scale, softcap)
    p = torch.exp(s - _finite(lse)[..., None]).masked_fill(~visible[:, None], 0.0)
    ds = p * (dout @ _per_query_head(v, q).mT - delta[..., None])
    if softcap:
        ds = ds * (1 - (s / softcap) ** 2)
    dq = scale * ds @ _per_query_head(k, q)
    dk = _per_kv_head(scale * ds.mT @ q, k)
    dv = _per_kv_head(p.mT @ dout, v)
    if sinks is None:
        return dq, dk, dv, None
    p_sink = torch.exp(sinks[None, :, None] - _finite(lse))
    return dq, dk, dv, -(p_sink * delta).sum(dim=(0, 2))


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else scale


def _finite(m: Tensor) -> Tensor:
    return m.masked_fill(m == -math.inf, 0.0)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _per_kv_head(grad: Tensor, x: Tensor) -> Tensor:
    return grad.unflatten(1, (x.shape[1], -1)).sum(dim=2)
