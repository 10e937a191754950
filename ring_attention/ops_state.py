# SPDX-License-Identifier: BSD-3-Clause
"""States and rows: `combine_`, `finish_`, `delta`, `sink_gradient`, see `ring_attention.ops`."""

import torch
from torch import Tensor

from . import checks
from .checks import state_dtype
from .library import OPS, mark_written

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
    OPS.combine_(*args)
    mark_written(acc, m, l)


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
    OPS.finish_(acc, m, l, out, lse)
    mark_written(out, lse)


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
    result: Tensor = OPS.delta(out, dout, dlse)
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
    result: Tensor = OPS.sink_gradient(sinks, lse, delta)
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
