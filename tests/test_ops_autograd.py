# SPDX-License-Identifier: BSD-3-Clause
"""The operators under autograd, opcheck and the compiler."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bounds import error, ulp
from intervals import causal, full
from problems import Problem, blocks, fold_, folded, new_output, new_state, problem
from ring_attention import ops, reference

OPS = torch.ops.ring_attention


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
