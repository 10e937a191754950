# SPDX-License-Identifier: BSD-3-Clause
"""The operators: typed wrappers, fake kernels and autograd, in the order of an op's life.

Two families. `forward` and `backward` are functional and differentiable: attention of one process.
The others work in place on a running state and are what a ring is made of: `block_forward_` folds
a few K/V blocks into `(acc, m, l)`, `block_backward_` adds their gradients, `combine_` joins two
states, `finish_` turns a state into `(out, lse)`. They are not differentiable and refuse tensors
that require grad.

S is the state's dtype: float32, and float64 for float64 inputs (on the CPU; CUDA has no kernels
for them). Masks are intervals: row i of
sample b sees key j of a block iff key_begin[n, b, i] <= j < key_end[n, b, i] for some n (int32
[n, batch or 1, q_len], any strides; bounds outside [0, k_len] are clamped; the intervals of a row
are disjoint). The mathematics is in `ring_attention.reference`.

q, k, v, dout may have any outer strides. One whose last dimension is not contiguous, or whose
address is not a multiple of its element size, is copied once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ring_attention import checks
from ring_attention.checks import state_dtype


def _load(name: str) -> bool:
    """Loads a library of this package; False where there is none."""
    libraries = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        raise ImportError(
            f"ring_attention: could not load {libraries[0]} with torch {torch.__version__} "
            f"({error}); it needs torch >= 2.11, otherwise {_BUILD}"
        ) from error
    return True


_BUILD = "build it with `pip install .` or `python setup.py build_ext --inplace`"
if not _load("_C"):
    raise ImportError(
        f"ring_attention: expected {Path(__file__).parent}/_C.*so, found none; {_BUILD}"
    )
# Its kernels register for CUDA, so it needs a torch that knows CUDA; a GPU it needs only to run.
if torch.version.cuda is not None and _load("_C_cuda"):
    checks.DEVICES.append("cuda")
_ops = torch.ops.ring_attention

# Of a ring's folds, between kernels that leave no Python in the caches: block_forward_ and
# block_backward_ of tensors that were checked, or made, by the ring, and that autograd never saw.
# The library's own checks, of memory safety, remain.
fold_ = _ops.block_forward_.default
fold_backward_ = _ops.block_backward_.default


def isa_name() -> str:
    """The instruction set the CPU kernels use: the best supported, or RING_ATTENTION_CPU."""
    name: str = _ops.cpu_isa()
    return name


def isa_names() -> list[str]:
    """The instruction sets this machine supports, best first: values of RING_ATTENTION_CPU."""
    names: list[str] = _ops.cpu_isas()
    return names


def peak_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Floating point operations per second of a loop of nothing but multiply-adds.

    Uses the instruction that the CPU kernels multiply `dtype` with, on torch.get_num_threads()
    threads: the rate that benchmarks measure the kernels against.
    """
    flops: float = _ops.cpu_peak_flops(torch.empty(0, dtype=dtype), seconds)
    return flops


# ---------------------------------------------------------------------------------------------
# What the operators write into


def empty_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [batch, heads, q_len, v_head_dim], dense in q's dimension order, and lse; unwritten."""
    # An expanded dimension counts as outermost.
    order = sorted(range(3), key=lambda d: (bool(q.stride(d) != 0), -q.stride(d)))
    out = torch.empty_permuted(
        (*q.shape[:3], v.shape[3]), (*order, 3), dtype=q.dtype, device=q.device
    )
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def empty_state(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state (acc, m, l) of q's rows, unwritten: the first fold does not read it."""
    dtype = state_dtype(q.dtype)
    acc = q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype)
    return acc, q.new_empty(q.shape[:3], dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)


# ---------------------------------------------------------------------------------------------
# forward


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
        key_begin: int32 [n, batch or 1, q_len], see the module's text.
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
    out, lse = _ops.forward(q, k, v, key_begin, key_end, sinks, scale, softcap)
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
    dq, dk, dv, dsinks = _ops.backward(
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
    dq, dk, dv, dsinks = _ops.backward(*args)
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


# ---------------------------------------------------------------------------------------------
# block_forward_


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
    _ops.block_forward_(*args)
    _mark_written(acc, m, l, out, lse)


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
    _ops.block_backward_(*args)
    _mark_written(dq, *dk, *dv)


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


# ---------------------------------------------------------------------------------------------
# combine_


def combine_(
    acc: Tensor,
    m: Tensor,
    l: Tensor,  # noqa: E741
    other_acc: Tensor,
    other_m: Tensor,
    other_l: Tensor,
) -> None:
    """Joins another state of the same queries into (acc, m, l), in place.

    Args:
        acc: S [batch, heads, q_len, v_head_dim], contiguous.
        m: S [batch, heads, q_len], contiguous, log2 units.
        l: S [batch, heads, q_len], contiguous; 0 where no key was seen.
        other_acc, other_m, other_l: the state to add, shaped alike; not changed.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: an argument requires grad.
    """
    args = (acc, m, l, other_acc, other_m, other_l)
    _check_combine(*args)
    checks.no_grad("combine_", acc=acc, m=m, l=l, other_acc=other_acc, other_l=other_l)
    _ops.combine_(*args)
    _mark_written(acc, m, l)


def _check_combine(
    acc: Tensor,
    m: Tensor,
    l: Tensor,  # noqa: E741
    other_acc: Tensor,
    other_m: Tensor,
    other_l: Tensor,
) -> None:
    shape = tuple(acc.shape)
    checks.state("combine_", acc, m, l, shape, acc)
    checks.dense("combine_", "other_acc", other_acc, shape, "shaped like acc", acc)
    checks.dense("combine_", "other_m", other_m, shape[:3], "shaped like m", acc)
    checks.dense("combine_", "other_l", other_l, shape[:3], "shaped like l", acc)


torch.library.register_fake("ring_attention::combine_", _check_combine)


# ---------------------------------------------------------------------------------------------
# finish_


def finish_(
    acc: Tensor,
    m: Tensor,
    l: Tensor,  # noqa: E741
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes out = acc / l, rounded once, and lse = ln(2) (m + log2 l); 0 and -inf if l = 0.

    Args:
        acc: S [batch, heads, q_len, v_head_dim], contiguous.
        m: S [batch, heads, q_len], contiguous, log2 units.
        l: S [batch, heads, q_len], contiguous.
        out: [batch, heads, q_len, v_head_dim], rows contiguous, any dtype whose state is S.
        lse: S [batch, heads, q_len], contiguous.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: an argument requires grad.
    """
    _check_finish(acc, m, l, out, lse)
    checks.no_grad("finish_", acc=acc, m=m, l=l, out=out, lse=lse)
    _ops.finish_(acc, m, l, out, lse)
    _mark_written(out, lse)


def _check_finish(
    acc: Tensor,
    m: Tensor,
    l: Tensor,  # noqa: E741
    out: Tensor,
    lse: Tensor,
) -> None:
    checks.output("finish_", out)
    checks.written_rows("finish_", "out", out)
    checks.state("finish_", acc, m, l, tuple(out.shape), out)
    checks.dense("finish_", "lse", lse, tuple(out.shape[:3]), "[batch, heads, q_len]", out)


torch.library.register_fake("ring_attention::finish_", _check_finish)


# ---------------------------------------------------------------------------------------------
# delta and sink_gradient


def delta(out: Tensor, dout: Tensor, dlse: Tensor | None = None) -> Tensor:
    """rowsum(dout * out) - dlse, what the backward subtracts from dP.

    Args:
        out: [batch, heads, q_len, v_head_dim], as returned (rounded).
        dout: its gradient, same shape and dtype.
        dlse: S [batch, heads, q_len], or None for zero.

    Returns:
        S [batch, heads, q_len], contiguous.

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: an argument requires grad.
    """
    _check_delta(out, dout, dlse)
    checks.no_grad("delta", out=out, dout=dout, dlse=dlse)
    result: Tensor = _ops.delta(out, dout, dlse)
    return result


def _check_delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> None:
    checks.output("delta", out)
    checks.rows("delta", "dout", dout, tuple(out.shape), "shaped like out", out)
    if dlse is not None:
        checks.gradient_of_lse("delta", dlse, out)


def _delta_fake(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    _check_delta(out, dout, dlse)
    return out.new_empty(out.shape[:3], dtype=state_dtype(out.dtype))


torch.library.register_fake("ring_attention::delta", _delta_fake)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum over batch and rows of exp(sink - lse) delta, in one fixed order of additions.

    Args:
        sinks: S [heads]; -inf is none.
        lse: S [batch, heads, q_len], sink included; contiguous.
        delta: S [batch, heads, q_len], contiguous.

    Returns:
        S [heads].

    Raises:
        ValueError, TypeError: see `ring_attention.checks`.
        RuntimeError: an argument requires grad.
    """
    _check_sink_gradient(sinks, lse, delta)
    checks.no_grad("sink_gradient", sinks=sinks, lse=lse, delta=delta)
    result: Tensor = _ops.sink_gradient(sinks, lse, delta)
    return result


def _check_sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> None:
    shape = tuple(lse.shape)
    checks.dense("sink_gradient", "lse", lse, shape[:3], "[batch, heads, q_len]", lse)
    checks.dense("sink_gradient", "delta", delta, shape, "shaped like lse", lse)
    checks.dense("sink_gradient", "sinks", sinks, shape[1:2], "[heads]", lse)


def _sink_gradient_fake(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    _check_sink_gradient(sinks, lse, delta)
    return torch.empty_like(sinks)


torch.library.register_fake("ring_attention::sink_gradient", _sink_gradient_fake)


def _mark_written(*tensors: Tensor | None) -> None:
    # Autograd must notice when a tensor it saved was written; compiled code sees the schema.
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version(
        [x for x in tensors if x is not None and not x.is_inference()]
    )
