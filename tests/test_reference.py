# SPDX-License-Identifier: BSD-3-Clause
"""The oracle against torch: its autograd formulas, its state and its written-out backward."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ring_attention import reference

EPS = torch.finfo(torch.float64).eps


def inputs(
    q_len: int = 11, k_len: int = 13, heads: int = 4, kv_heads: int = 2, v_head_dim: int = 24
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(2, heads, q_len, 16, dtype=torch.float64)
    k = torch.randn(2, kv_heads, k_len, 16, dtype=torch.float64)
    v = torch.randn(2, kv_heads, k_len, v_head_dim, dtype=torch.float64)
    visible = torch.rand(2, q_len, k_len) < 0.4
    visible[:, :, 0] = True
    return q, k, v, visible


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=200 * EPS, atol=200 * EPS)


def test_attention_is_torchs() -> None:
    q, k, v, visible = inputs(v_head_dim=16)
    out, lse = reference.attention(q, k, v, visible)
    close(out, sdpa(q, k, v, attn_mask=visible[:, None], enable_gqa=True))
    s = q @ k.repeat_interleave(2, 1).mT / 4
    close(lse, s.masked_fill(~visible[:, None], -math.inf).logsumexp(-1))


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_backward_formulas_are_autograds(softcap: float, with_sinks: bool) -> None:
    q, k, v, visible = inputs()
    visible[0, 3] = visible[1, 7] = False  # rows that see nothing
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    out, lse = reference.attention(q, k, v, visible, scale=0.3, softcap=softcap, sinks=sinks)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    got = reference.backward(
        dout, dlse, q, k, v, out, lse, visible, scale=0.3, softcap=softcap, sinks=sinks
    )
    assert (got[3] is None) == (sinks is None)
    for a, b in zip(got, expected, strict=False):
        assert a is not None
        close(a, b)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradcheck(with_sinks: bool) -> None:
    q, k, v, visible = inputs(q_len=3, k_len=4, heads=2, kv_heads=1, v_head_dim=16)
    visible[0, 1] = False
    leaves = [x[:1].requires_grad_() for x in (q, k, v)]
    if with_sinks:
        leaves.append(torch.randn(2, dtype=torch.float64, requires_grad=True))

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
        out, lse = reference.attention(q, k, v, visible[:1], softcap=2.0, sinks=sinks)
        return out, lse[torch.isfinite(lse)]

    assert torch.autograd.gradcheck(call, leaves, atol=1e-6)


def test_rows_that_see_nothing() -> None:
    q, k, v, visible = inputs()
    visible[:, 2] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(q, k, v, visible)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 3:].sum(), leaves)
    assert (dq[:, :, 2] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    # With a sink they see the sink alone; a sink of -inf is none.
    sinks = torch.tensor([0.5, -1.0, -math.inf, 3.0], dtype=torch.float64)
    out, lse = reference.attention(q, k, v, visible, sinks=sinks)
    assert (out[:, :, 2] == 0).all()
    close(lse[:, :, 2], sinks.expand(2, 4))
    plain, plain_lse = reference.attention(q, k, v, visible)
    close(out[:, 2], plain[:, 2])
    close(lse[:, 2], plain_lse[:, 2])


def test_no_keys() -> None:
    q, k, v, visible = inputs(k_len=1)
    out, lse = reference.attention(q, k[:, :, :0], v[:, :, :0], visible[:, :, :0])
    assert out.shape == (2, 4, 11, 24) and (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_folding_blocks_is_attention(with_sinks: bool) -> None:
    q, k, v, visible = inputs(k_len=29)
    visible[0, 3] = False
    visible[:, :5, 7:21] = False  # rows that see nothing of the middle block
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    state = reference.initial_state(q, 24, sinks)
    for begin, end in ((0, 7), (7, 21), (21, 21), (21, 29)):
        keys = slice(begin, end)
        state = reference.fold(state, q, k[:, :, keys], v[:, :, keys], visible[:, :, keys])
    expected = reference.attention(q, k, v, visible, sinks=sinks)
    for a, b in zip(reference.finish(state), expected, strict=True):
        close(a, b)


def test_combine_joins_states_and_empty_is_neutral() -> None:
    q, k, v, visible = inputs()
    visible[0, 3] = False
    empty = reference.initial_state(q, 24)
    left = reference.fold(empty, q, k[:, :, :6], v[:, :, :6], visible[:, :, :6])
    right = reference.fold(empty, q, k[:, :, 6:], v[:, :, 6:], visible[:, :, 6:])
    expected = reference.attention(q, k, v, visible)
    for both in (reference.combine(left, right), reference.combine(right, left)):
        for a, b in zip(reference.finish(both), expected, strict=True):
            close(a, b)
    for same in (reference.combine(left, empty), reference.combine(empty, left)):
        for a, b in zip(same, left, strict=True):
            assert torch.equal(a, b)


def test_visible_keys() -> None:
    begin = torch.tensor([[[0, -5, 3, 4]], [[4, 9, 0, 2]]], dtype=torch.int32)
    end = torch.tensor([[[2, 1, 3, 9]], [[5, 20, 0, 3]]], dtype=torch.int32)
    expected = torch.tensor(
        [[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]]
    )
    assert torch.equal(reference.visible_keys(begin, end, 6), expected.bool()[None])
