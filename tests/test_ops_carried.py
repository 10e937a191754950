# SPDX-License-Identifier: BSD-3-Clause
"""The operators on states that a call did not make: carried into it, joined, finished."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bounds import assert_within, state_bounds
from intervals import full, scattered
from problems import (
    Problem,
    State,
    after,
    any_state,
    blocks,
    each_low,
    fold_,
    new_output,
    new_state,
    problem,
)
from ring_attention import ops, reference

# None, less than a tile, and enough for few rows to be cut into parts.
K_LENS = [0, 40, 520]
HEADS = {"heads": 2, "kv_heads": 1}


def assert_follows(p: Problem, state: State, got: Sequence[Tensor]) -> None:
    """(out, lse) are those of `state` and all keys."""
    exact = reference.finish(after(p, state))
    for name, a, b, bound in zip(("out", "lse"), got, exact, state_bounds(p, state), strict=True):
        assert_within(name, a, b, bound)


@pytest.mark.isa
@each_low
def test_any_state_is_carried(dtype: torch.dtype) -> None:
    for k_len in K_LENS:
        for q_len in (5, 37):  # few rows, which CUDA has a tile for, and more
            p = problem(dtype, scattered, q_len=q_len, k_len=k_len, v_head_dim=40, **HEADS)
            state, output = any_state(p), new_output(p)
            kv = blocks(p, ()) if k_len else []
            fold_(p, kv, state, output, last=True)
            assert_follows(p, state, output)
            further = tuple(x.clone() for x in state)
            fold_(p, kv, further)
            acc, m, l = (x.double() for x in further)  # noqa: E741
            out, lse = reference.finish(reference.State(acc, m, l))
            assert_follows(p, state, (out.to(dtype), lse.to(m.dtype)))


@pytest.mark.isa
@each_low
def test_rows_that_see_nothing_have_the_empty_state(dtype: torch.dtype) -> None:
    for k_len in K_LENS:
        for q_len in (5, 37):
            p = problem(dtype, scattered, q_len=q_len, k_len=k_len, head_dim=24, **HEADS)
            acc, m, l = new_state(p)  # noqa: E741
            fold_(p, blocks(p, ()) if k_len else [], (acc, m, l), first=True)
            empty = ~p.visible.any(dim=-1)[:, None].expand(m.shape)
            assert empty.any()
            assert (acc[empty] == 0).all() and (m[empty] == -math.inf).all()
            assert torch.equal(l == 0, empty)


@pytest.mark.isa
@each_low
def test_any_two_states_are_joined(dtype: torch.dtype) -> None:
    p = problem(dtype, full, k_len=0, v_head_dim=136)
    ours, theirs = any_state(p), any_state(p)
    exact = reference.combine(*(reference.State(*(x.double() for x in s)) for s in (ours, theirs)))
    ops.combine_(*ours, *theirs)
    # References apart by 600 have that many roundings of an exponent.
    for a, b in zip(reference.finish(reference.State(*ours)), reference.finish(exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.isa
@each_low
def test_any_state_is_finished(dtype: torch.dtype) -> None:
    p = problem(dtype, full, k_len=0, v_head_dim=136)
    state, output = any_state(p), new_output(p)
    ops.finish_(*state, *output)
    assert_follows(p, state, output)


@pytest.mark.isa
@each_low
@pytest.mark.parametrize("v_head_dim", range(32, 257, 32))
def test_one_row_of_keys_in_parts(v_head_dim: int, dtype: torch.dtype) -> None:
    """What a warp reads of the parts' states, of two or of four at a time, ends where they end."""
    k_len = 1100 if v_head_dim % 64 else 520
    p = problem(
        dtype, full, batch=1, heads=1, kv_heads=1, q_len=1, k_len=k_len, v_head_dim=v_head_dim
    )
    state, output = any_state(p), new_output(p)
    fold_(p, blocks(p, ()), state, output, last=True)
    assert_follows(p, state, output)


@pytest.mark.isa
@pytest.mark.parametrize("q_len", [1, 85, 430])
def test_sink_gradients(q_len: int) -> None:
    """Up to several rows for each of a block's threads; of rows that saw nothing, of no sink."""
    sinks, lse, delta = torch.randn(4), torch.randn(3, 4, q_len), torch.randn(3, 4, q_len)
    sinks[1] = -math.inf
    lse[0, 1] = -math.inf
    weights = torch.exp(sinks.double()[:, None] - lse.double()).nan_to_num()
    size = (weights * delta.abs()).sum(dim=(0, 2))
    exact = -(weights * delta).sum(dim=(0, 2))
    assert_within("dsinks", ops.sink_gradient(sinks, lse, delta), exact, 4e-6 * size)
