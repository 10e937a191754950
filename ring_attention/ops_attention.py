# SPDX-License-Identifier: BSD-3-Clause
"""The functional, differentiable operators `forward` and `backward`, see `ring_attention.ops`."""

from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import state_dtype
from .library import OPS
from .ops_state import empty_output


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_begin: Tensor,
    key_end: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of one process; differentiable once, through out and lse.

    Args:
        q: [batch, heads, q_len, head_dim], float32, bfloat16, float16 or float64.
        k: [batch, kv_heads, k_len, head_dim], dtype of q; heads is a multiple of kv_heads.
        v: [batch, kv_heads, k_len, v_head_dim], dtype of q.
        key_begin: int32 [n, batch or 1, q_len], see `ring_attention.ops`.
        key_end: int32 [n, batch or 1, q_len].
        sinks: S [heads] or None: one more score per row, with value zero.
        scale: factor of q.k.
        softcap: scores are softcap * tanh(scale q.k / softcap); 0 is none.

    Returns:
        out [batch, heads, q_len, v_head_dim], dtype and dimension order of q, dense; and
        lse S [batch, heads, q_len], natural logarithm, sink included. A row that sees nothing
        has out = 0, lse = -inf and zero gradients.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
        >>> begin = torch.zeros(1, 1, 5, dtype=torch.int32)
        >>> causal_end = torch.arange(1, 6, dtype=torch.int32).view(1, 1, 5)
        >>> out, lse = forward(q, k, v, begin, causal_end, None, 16**-0.5)
    """
    checks.attention("forward", q, k, v, sinks=sinks, scale=scale, softcap=softcap)
    checks.intervals("forward", key_begin, key_end, q)
    out, lse = OPS.forward(q, k, v, key_begin, key_end, sinks, scale, softcap)
    return out, lse


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_begin: Tensor,
    key_end: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    checks.attention("forward", q, k, v, sinks=sinks, scale=scale, softcap=softcap)
    checks.intervals("forward", key_begin, key_end, q)
    return empty_output(q, v)


torch.library.register_fake("ring_attention::forward", _forward_fake)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, key_begin, key_end, sinks, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = OPS.backward(
        dout, dlse, q, k, v, out, lse, key_begin, key_end, sinks, ctx.scale, ctx.softcap
    )
    return dq, dk, dv, None, None, None if sinks is None else dsinks, None, None


torch.library.register_autograd(
    "ring_attention::forward", _forward_backward, setup_context=_save_for_backward
)


# ---------------------------------------------------------------------------------------------
# backward


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_begin: Tensor,
    key_end: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `forward`.

    Args:
        dout: gradient of out, [batch, heads, q_len, v_head_dim], dtype of q.
        dlse: gradient of lse, S [batch, heads, q_len], or None for zero.
        out, lse: as returned by `forward`; the others as given to it.

    Returns:
        dq, dk, dv shaped like q, k, v in their dtype, summed in S and rounded once; and dsinks
        S [heads], empty without sinks.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: when differentiated itself (double backward).
    """
    args = (dout, dlse, q, k, v, out, lse, key_begin, key_end, sinks, scale, softcap)
    _check_backward(*args)
    dq, dk, dv, dsinks = OPS.backward(*args)
    return dq, dk, dv, dsinks


def _check_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_begin: Tensor,
    key_end: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> None:
    checks.attention("backward", q, k, v, sinks=sinks, scale=scale, softcap=softcap)
    checks.intervals("backward", key_begin, key_end, q)
    wide = (*q.shape[:3], v.shape[3])
    checks.rows("backward", "dout", dout, wide, "[batch, heads, q_len, v_head_dim]", q)
    checks.rows("backward", "out", out, wide, "[batch, heads, q_len, v_head_dim]", q)
    checks.dense("backward", "lse", lse, tuple(q.shape[:3]), "[batch, heads, q_len]", q)
    if dlse is not None:
        checks.gradient_of_lse("backward", dlse, q)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(*args)
    _, _, q, k, v, _, _, _, _, sinks, _, _ = args
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = q.new_empty((0,) if sinks is None else sinks.shape, dtype=state_dtype(q.dtype))
    return dq, dk, dv, dsinks


torch.library.register_fake("ring_attention::backward", _backward_fake)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "ring_attention.backward: expected one differentiation, got a second one (double "
        "backward); it is not implemented: use ring_attention.reference.attention for that"
    )


torch.library.register_autograd("ring_attention::backward", _refuse_double_backward)
