# SPDX-License-Identifier: BSD-3-Clause
"""What folds K/V blocks: `block_forward_` and `block_backward_`, see `ring_attention.ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .library import OPS, mark_written

# The same for the ring, of tensors that it has checked or made, and that autograd never saw: after
# a kernel the caches hold no Python, and checks cost a percent of a short fold. The library's own
# checks, of memory safety, remain.
fold_ = OPS.block_forward_.default
fold_backward_ = OPS.block_backward_.default


def block_forward_(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    key_begin: Sequence[Tensor],
    key_end: Sequence[Tensor],
    sinks: Tensor | None,
    acc: Tensor | None,
    m: Tensor | None,
    l: Tensor | None,  # noqa: E741
    out: Tensor | None,
    lse: Tensor | None,
    first: bool,
    last: bool,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """Folds K/V blocks into the running state of q, in place.

    Args:
        q: [batch, heads, q_len, head_dim].
        k: blocks [batch, kv_heads, k_len of the block, head_dim]; the list may be empty.
        v: blocks [batch, kv_heads, k_len of the block, v_head_dim].
        key_begin: per block int32 [n, batch or 1, q_len], indices into that block.
        key_end: per block int32 [n, batch or 1, q_len].
        sinks: S [heads], only with `first`.
        acc: S [batch, heads, q_len, v_head_dim], contiguous. The state may be None if `first`
            and `last`.
        m: S [batch, heads, q_len], contiguous, log2 units.
        l: S [batch, heads, q_len], contiguous.
        out: [batch, heads, q_len, v_head_dim], dtype of q, rows contiguous; written with `last`.
        lse: S [batch, heads, q_len], contiguous; written with `last`.
        first: the state is not read: it starts empty, or from the sinks.
        last: out and lse are written, the state is not.
        scale: factor of q.k.
        softcap: 0 is none.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: an argument requires grad.
    """
    args = (q, k, v, key_begin, key_end, sinks, acc, m, l, out, lse, first, last, scale, softcap)
    _check_block_forward(*args)
    checks.no_grad("block_forward_", q=q, k=k, v=v, sinks=sinks, acc=acc, m=m, l=l, out=out)
    OPS.block_forward_(*args)
    mark_written(acc, m, l, out, lse)


def _check_block_forward(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    key_begin: Sequence[Tensor],
    key_end: Sequence[Tensor],
    sinks: Tensor | None,
    acc: Tensor | None,
    m: Tensor | None,
    l: Tensor | None,  # noqa: E741
    out: Tensor | None,
    lse: Tensor | None,
    first: bool,
    last: bool,
    scale: float,
    softcap: float,
) -> None:
    op = "block_forward_"
    state = [x for x in (acc, m, l) if x is not None]
    if len(state) not in (0, 3) or (not state and not (first and last)):
        checks.refuse(op, "acc, m and l, or None for all if first and last", f"{len(state)} of 3")
    if last and (out is None or lse is None):
        checks.refuse(op, "out and lse with last", "None", "allocate what the last fold writes")
    if sinks is not None and not first:
        checks.refuse(op, "no sinks unless first", "some", "they are part of the initial state")
    wide = acc if out is None else out
    assert wide is not None
    checks.query(op, q, scale=scale, softcap=softcap)
    shape = (*q.shape[:3], wide.shape[-1])
    if acc is not None and m is not None and l is not None:
        checks.state(op, acc, m, l, shape, q)
    if out is not None:
        checks.rows(op, "out", out, shape, "[batch, heads, q_len, v_head_dim]", q)
        checks.head_dim(op, "out", out)
        checks.written_rows(op, "out", out)
    if lse is not None:
        checks.dense(op, "lse", lse, shape[:3], "[batch, heads, q_len]", q)
    if sinks is not None:
        checks.dense(op, "sinks", sinks, (q.shape[1],), "[heads]", q)
    checks.blocks(op, q, k, v, key_begin, key_end, shape[3])


torch.library.register_fake("ring_attention::block_forward_", _check_block_forward)


# ---------------------------------------------------------------------------------------------
# block_backward_


def block_backward_(
    q: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    key_begin: Sequence[Tensor],
    key_end: Sequence[Tensor],
    dq: Tensor,
    dk: Sequence[Tensor],
    dv: Sequence[Tensor],
    scale: float,
    softcap: float = 0.0,
) -> None:
    """Adds the gradients of K/V blocks to dq, dk and dv, in place.

    Args:
        q, k, v, key_begin, key_end, scale, softcap: as given to `block_forward_`.
        dout: gradient of out, [batch, heads, q_len, v_head_dim], dtype of q.
        lse: S [batch, heads, q_len], over all blocks and the sink; contiguous.
        delta: S [batch, heads, q_len], see `delta`; contiguous.
        dq: S [batch, heads, q_len, head_dim], contiguous, added to.
        dk: per block S [batch, kv_heads, k_len, head_dim], contiguous, added to.
        dv: per block S [batch, kv_heads, k_len, v_head_dim], contiguous, added to.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: an argument requires grad, or two gradients share memory.
    """
    args = (q, dout, lse, delta, k, v, key_begin, key_end, dq, dk, dv, scale, softcap)
    _check_block_backward(*args)
    checks.no_grad("block_backward_", q=q, dout=dout, lse=lse, k=k, v=v, dq=dq, dk=dk, dv=dv)
    OPS.block_backward_(*args)
    mark_written(dq, *dk, *dv)


def _check_block_backward(
    q: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    key_begin: Sequence[Tensor],
    key_end: Sequence[Tensor],
    dq: Tensor,
    dk: Sequence[Tensor],
    dv: Sequence[Tensor],
    scale: float,
    softcap: float,
) -> None:
    op = "block_backward_"
    checks.query(op, q, scale=scale, softcap=softcap)
    shape = (*q.shape[:3], dout.shape[-1])
    checks.rows(op, "dout", dout, shape, "[batch, heads, q_len, v_head_dim]", q)
    checks.head_dim(op, "dout", dout)
    checks.dense(op, "lse", lse, shape[:3], "[batch, heads, q_len]", q)
    checks.dense(op, "delta", delta, shape[:3], "[batch, heads, q_len]", q)
    checks.dense(op, "dq", dq, tuple(q.shape), "shaped like q", q)
    checks.blocks(op, q, k, v, key_begin, key_end, shape[3])
    for name, grads, inputs in (("dk", dk, k), ("dv", dv, v)):
        checks.same_length(op, name, grads, k)
        for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
            checks.dense(op, f"{name}[{i}]", grad, tuple(x.shape), f"shaped like {name[1]}", q)


torch.library.register_fake("ring_attention::block_backward_", _check_block_backward)
