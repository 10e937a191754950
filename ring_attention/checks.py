# SPDX-License-Identifier: BSD-3-Clause
"""What the operators accept, said once for wrappers and fake kernels.

Every refusal names the operator, the argument, what was expected, what came and the remedy:
`ring_attention.forward: expected k.shape[3] == q.shape[3], got 96 and 128; ...`. Shapes and
values raise ValueError, dtypes TypeError. The C++ side checks again what memory safety needs.
"""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Those that kernels are registered for; library.py adds "cuda" when it has loaded them.
DEVICES = ["cpu", "meta"]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, lse and summed gradients: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Checks q, k, v and what goes with them.

    Args:
        op: the operator that errors name: "forward", "attention".
        q: [batch, heads, q_len, head_dim], one of DTYPES.
        k: [batch, kv_heads, k_len, head_dim], dtype of q.
        v: [batch, kv_heads, k_len, v_head_dim], dtype of q.
        sinks: [heads], state dtype.
        scale: finite.
        softcap: finite, >= 0.

    Raises:
        ValueError, TypeError: as the module says.
    """
    query(op, q, scale=scale, softcap=softcap)
    key_value(op, q, k, v)
    if sinks is not None:
        dense(op, "sinks", sinks, (q.shape[1],), "[heads]", q)


def query(op: str, q: Tensor, *, scale: float, softcap: float) -> None:
    """Checks q, scale and softcap, as in `attention`."""
    _bhsd(op, "q", q)
    _dtype(op, "q", q, DTYPES, "cast the inputs")
    device(op, "q", q, q)
    head_dim(op, "q", q)
    if not math.isfinite(scale):
        refuse(op, "a finite scale", scale)
    if not (math.isfinite(softcap) and softcap >= 0):
        refuse(op, "softcap finite and >= 0", softcap, "0 means none")


def key_value(op: str, q: Tensor, k: Tensor, v: Tensor, *, block: str = "") -> None:
    """Checks k and v against q, as in `attention`; errors name k[2] for block="[2]"."""
    k_name, v_name = f"k{block}", f"v{block}"
    for name, x in ((k_name, k), (v_name, v)):
        _bhsd(op, name, x)
        _dtype(op, name, x, (q.dtype,), "q, k and v need the same dtype")
        device(op, name, x, q)
    equal = (
        (k_name, k, "q", q, 0, "q, k and v need the same batch"),
        (k_name, k, "q", q, 3, "q and k need the same head_dim"),
        (v_name, v, k_name, k, 0, "q, k and v need the same batch"),
        (v_name, v, k_name, k, 1, "k and v need the same kv_heads"),
        (v_name, v, k_name, k, 2, "k and v need the same length"),
    )
    for x_name, x, y_name, y, dim, remedy in equal:
        if x.shape[dim] != y.shape[dim]:
            got = f"{x.shape[dim]} and {y.shape[dim]}"
            refuse(op, f"{x_name}.shape[{dim}] == {y_name}.shape[{dim}]", got, remedy)
    head_dim(op, v_name, v)
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        got = f"{q.shape[1]} and {k.shape[1]}"
        remedy = "every K/V head serves the same number of query heads"
        refuse(op, f"q.shape[1] to be a multiple of {k_name}.shape[1]", got, remedy)


def head_dim(op: str, name: str, x: Tensor) -> None:
    """Checks x.shape[3]: the kernels have head dims 16..256 in steps of 8."""
    if not (16 <= x.shape[3] <= 256 and x.shape[3] % 8 == 0):
        expected = f"{name}.shape[3] in 16, 24, ..., 256 (steps of 8)"
        refuse(op, expected, x.shape[3], "pad the heads with zeros")


def intervals(op: str, key_begin: Tensor, key_end: Tensor, q: Tensor, *, block: str = "") -> None:
    """Checks interval bounds: int32 [n, batch or 1, q_len], any strides, the same shape."""
    for name, bound in ((f"key_begin{block}", key_begin), (f"key_end{block}", key_end)):
        _dtype(op, name, bound, (torch.int32,), "cast the bounds with .int()")
        device(op, name, bound, q)
        batch_ok = bound.dim() == 3 and (bound.shape[1] == q.shape[0] or bound.shape[1] == 1)
        if not batch_ok or bound.shape[2] != q.shape[2]:
            expected = f"{name}.shape == [n, {q.shape[0]} or 1, {q.shape[2]}]"
            refuse(op, expected, list(bound.shape), "it is [intervals, batch or 1, q_len]")
    if key_begin.shape[0] != key_end.shape[0]:
        got = f"{key_begin.shape[0]} and {key_end.shape[0]}"
        refuse(op, f"key_begin{block}.shape[0] == key_end{block}.shape[0]", got)


def blocks(
    op: str,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    key_begin: Sequence[Tensor],
    key_end: Sequence[Tensor],
    v_head_dim: int,
) -> None:
    """Checks lists of K/V blocks with their intervals; they may be empty."""
    for name, entries in (("v", v), ("key_begin", key_begin), ("key_end", key_end)):
        same_length(op, name, entries, k)
    for i in range(len(k)):
        block = f"[{i}]"
        key_value(op, q, k[i], v[i], block=block)
        intervals(op, key_begin[i], key_end[i], q, block=block)
        if k[i].shape[1] != k[0].shape[1]:
            got = f"{k[i].shape[1]} and {k[0].shape[1]}"
            refuse(op, f"k{block}.shape[1] == k[0].shape[1]", got, "blocks share their heads")
        if v[i].shape[3] != v_head_dim:
            refuse(op, f"v{block}.shape[3] == {v_head_dim}", v[i].shape[3], "as wide as out")


def same_length(op: str, name: str, entries: Sequence[Tensor], k: Sequence[Tensor]) -> None:
    """Checks that a list has one entry per block."""
    if len(entries) != len(k):
        remedy = "each block has one entry in every list"
        refuse(op, f"len({name}) == len(k)", f"{len(entries)} and {len(k)}", remedy)


def rows(op: str, name: str, x: Tensor, shape: tuple[int, ...], meaning: str, q: Tensor) -> None:
    """Checks a tensor of the inputs' dtype and a given shape, any strides: out or dout."""
    _dtype(op, name, x, (q.dtype,), f"{name} has the dtype of q")
    device(op, name, x, q)
    if tuple(x.shape) != shape:
        refuse(op, f"{name}.shape == {list(shape)}", list(x.shape), f"it is {meaning}")


def dense(op: str, name: str, x: Tensor, shape: tuple[int, ...], meaning: str, q: Tensor) -> None:
    """Checks a contiguous tensor of the state dtype: a state, lse, delta, sinks, a gradient."""
    _dtype(op, name, x, (state_dtype(q.dtype),), f"{name} has the state's dtype, not the inputs'")
    device(op, name, x, q)
    if tuple(x.shape) != shape:
        refuse(op, f"{name}.shape == {list(shape)}", list(x.shape), f"it is {meaning}")
    if not x.is_contiguous():
        refuse(op, f"{name} contiguous", f"strides {list(x.stride())}", "call .contiguous()")


def state(
    op: str,
    acc: Tensor,
    m: Tensor,
    l: Tensor,  # noqa: E741
    shape: tuple[int, ...],
    q: Tensor,
) -> None:
    """Checks a running state: acc of the given shape, m and l of all but its last dimension."""
    dense(op, "acc", acc, shape, "[batch, heads, q_len, v_head_dim]", q)
    dense(op, "m", m, shape[:3], "[batch, heads, q_len]", q)
    dense(op, "l", l, shape[:3], "[batch, heads, q_len]", q)


def written_rows(op: str, name: str, x: Tensor) -> None:
    """Checks an output: no copy can stand in for it, and its elements may not share memory."""
    expanded = any(x.stride(d) == 0 and x.shape[d] > 1 for d in range(3))
    if expanded or (x.stride(3) != 1 and x.shape[3] > 1):
        expected = f"{name} with rows of their own, last dimension contiguous"
        remedy = "pass memory that is not expanded or transposed in the last dimension"
        refuse(op, expected, f"strides {list(x.stride())}", remedy)


def output(op: str, out: Tensor) -> None:
    """Checks an out that comes without its q: [batch, heads, q_len, v_head_dim]."""
    _bhsd(op, "out", out)
    _dtype(op, "out", out, DTYPES, "pass the out of forward")
    device(op, "out", out, out)
    head_dim(op, "out", out)


def gradient_of_lse(op: str, dlse: Tensor, q: Tensor) -> None:
    """Checks dlse: [batch, heads, q_len], state dtype, any strides (it is copied if need be)."""
    _dtype(op, "dlse", dlse, (state_dtype(q.dtype),), "dlse has the dtype of lse")
    device(op, "dlse", dlse, q)
    if tuple(dlse.shape) != tuple(q.shape[:3]):
        refuse(op, f"dlse.shape == {list(q.shape[:3])}", list(dlse.shape), "shaped like lse")


def device(op: str, name: str, x: Tensor, q: Tensor) -> None:
    """Checks that x is where q is, and that there are kernels for it."""
    if x.device != q.device:
        refuse(op, f"{name}.device == {q.device}", x.device, "move all inputs to one device")
    if x.device.type not in DEVICES:
        names = " or ".join(kind for kind in DEVICES if kind != "meta")
        remedy = "there are no kernels for this device in this build"
        if x.device.type == "cuda":
            remedy += "; install with RING_ATTENTION_CUDA=1 and nvcc"
        refuse(op, f"{name}.device of type {names}", x.device, remedy)
    if x.device.type == "cuda" and x.dtype == torch.float64:
        expected = f"ring_attention.{op}: expected {name}.dtype float32 or bfloat16 or float16"
        raise TypeError(f"{expected} on CUDA, got float64; compute it on the CPU")


def no_grad(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Refuses tensors that autograd would lose track of."""
    if not torch.is_grad_enabled():
        return
    for name, entry in tensors.items():
        listed = [entry] if isinstance(entry, Tensor) else (entry or [])
        if any(x.requires_grad for x in listed):
            raise RuntimeError(
                f"ring_attention.{op}: expected no argument that requires grad, got {name}; this "
                "op is not differentiable: use ring_attention.ops.forward, or torch.no_grad()"
            )


def _bhsd(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        expected = f"{name} to have 4 dimensions [batch, heads, length, head_dim]"
        refuse(op, expected, f"shape {list(x.shape)}", "reshape it")


def _dtype(op: str, name: str, x: Tensor, allowed: tuple[torch.dtype, ...], remedy: str) -> None:
    if x.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"ring_attention.{op}: expected {name}.dtype {names}, got {got}; {remedy}")


def refuse(op: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    """Raises the ValueError of this module."""
    suffix = f"; {remedy}" if remedy else ""
    raise ValueError(f"ring_attention.{op}: expected {expected}, got {got}{suffix}")
