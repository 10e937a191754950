# SPDX-License-Identifier: BSD-3-Clause
"""The operators block by block: states folded, joined and finished, gradients added; invariants."""

from typing import Any

import pytest
import torch

from bounds import assert_matches_reference, error, ulp
from conftest import ON_VIRTUAL_GPU
from intervals import causal, each_mask, first_and_window, scattered
from problems import (
    blocks,
    each_dtype,
    fold_,
    folded,
    gradients,
    long,
    new_output,
    new_state,
    ours,
    problem,
    theirs,
)
from ring_attention import ops, reference


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_in_one_call_or_in_many(sinks: bool, dtype: torch.dtype) -> None:
    p = problem(dtype, q_len=45, k_len=203, sinks=sinks)
    kv = blocks(p, (60, 60, 113, 130))
    for groups in ([kv], [[b] for b in kv], [kv[:2], kv[2:]], [[], kv, []], [kv[:1], [], kv[1:]]):
        assert_matches_reference(p, folded(p, groups))


@pytest.mark.isa
def test_error_does_not_grow_with_folds() -> None:
    p = problem(torch.float32, causal, q_len=192, k_len=192, head_dim=64)
    exact = theirs(p, torch.float64)
    whole = folded(p, [blocks(p, ())])
    for many in (8, 64):
        cuts = [192 * i // many for i in range(1, many)]
        got = folded(p, [[b] for b in blocks(p, cuts)])
        for a, b, c in zip(got, whole, exact, strict=False):
            assert error(a, c) <= 2 * max(error(b, c), ulp(c, torch.float32))


@pytest.mark.isa
@each_dtype
def test_finish_is_the_last_fold(dtype: torch.dtype) -> None:
    p = problem(dtype, sinks=True)
    kv = blocks(p, (20,))
    by_last = folded(p, [kv[:1], kv[1:]])
    state, output = new_state(p), new_output(p)
    fold_(p, kv[:1], state, first=True)
    fold_(p, kv[1:], state)
    kept = [x.clone() for x in state]
    ops.finish_(*state, *output)
    for a, b in zip(output, by_last, strict=True):
        assert error(a, b.double()) <= ulp(b.double(), b.dtype)
    for a, b in zip(state, kept, strict=True):
        assert torch.equal(a, b)
    # The last fold writes out and lse, not the state.
    fold_(p, [], state, output, last=True)
    for a, b in zip(state, kept, strict=True):
        assert torch.equal(a, b)
    # Any strides of out.
    spread = torch.full((2, 37, 4, 40), 7.0, dtype=dtype).transpose(1, 2)[..., 4:36]
    ops.finish_(*kept, spread, output[1])
    assert torch.equal(spread, output[0])
    assert spread._base is not None
    assert (spread._base[..., :4] == 7).all() and (spread._base[..., 36:] == 7).all()


@pytest.mark.isa
@each_dtype
def test_combine_joins_split_keys(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered, k_len=101)
    kv = blocks(p, (40,))
    halves = [new_state(p), new_state(p)]
    for i, state in enumerate(halves):
        fold_(p, kv[i : i + 1], state, first=True)
    kept = [x.clone() for x in halves[1]]
    ops.combine_(*halves[0], *halves[1])
    output = new_output(p)
    ops.finish_(*halves[0], *output)
    for a, b in zip(halves[1], kept, strict=True):
        assert torch.equal(a, b)
    assert_matches_reference(p, output)


def test_combining_with_an_empty_state_changes_nothing() -> None:
    p = problem(torch.float32, scattered)
    state, empty = new_state(p), new_state(p)
    fold_(p, blocks(p, ()), state, first=True)
    fold_(p, [], empty, first=True)
    assert (empty[2] == 0).all()
    expected = [x.clone() for x in state]
    ops.combine_(*state, *empty)
    ops.combine_(*empty, *state)
    assert (expected[2] == 0).any()
    seen = expected[2] > 0
    for a, b, c in zip(state, empty, expected, strict=True):
        assert torch.equal(a[seen], c[seen]) and torch.equal(b[seen], c[seen])
    assert (state[2][~seen] == 0).all() and (empty[2][~seen] == 0).all()


def test_state_is_the_references() -> None:
    """m is a lazy maximum in log2 units, and (acc, l) are relative to it: Note [state]."""
    p = problem(torch.float32, scattered, sinks=True)
    p.k.mul_(8)
    state = new_state(p)
    fold_(p, blocks(p, ()), state, first=True)
    exact = reference.initial_state(p.q.double(), 32, p.sinks)
    q, k, v = p.q.double(), p.k.double(), p.v.double()
    exact = reference.fold(exact, q, k, v, p.visible, scale=p.scale)
    assert (state[1] <= exact.m + 1e-4).all() and (state[1] >= exact.m - 24.001).all()
    shift = torch.exp2(state[1].double() - exact.m)
    torch.testing.assert_close(state[2].double() * shift, exact.l, rtol=1e-5, atol=0)
    torch.testing.assert_close(state[0] * shift[..., None], exact.acc, rtol=1e-4, atol=1e-5)


# --- backward by blocks -----------------------------------------------------------------------


@pytest.mark.isa
@each_dtype
def test_gradients_add_up_over_blocks(dtype: torch.dtype) -> None:
    p = problem(dtype, q_len=45, k_len=203, softcap=5.0, sinks=True)
    kv = blocks(p, (60, 60, 113, 130))
    for groups in ([kv], [[b] for b in kv], [kv[:2], [], kv[2:]]):
        assert_matches_reference(p, [*ours(p)[:2], *gradients(p, groups)])


@pytest.mark.isa
@each_dtype
def test_gradients_are_added_to_what_is_there(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered)
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    grads = [torch.randn(x.shape, dtype=lse.dtype) for x in (p.q, p.k, p.v)]
    before = [x.clone() for x in grads]
    dq, dk, dv = grads
    ops.block_backward_(
        p.q, p.dout, lse, ops.delta(out, p.dout, p.dlse), [p.k], [p.v], [p.begin], [p.end],
        dq, [dk], [dv], p.scale,
    )  # fmt: skip
    for a, b, c in zip(grads, before, gradients(p, [blocks(p, ())]), strict=True):
        torch.testing.assert_close(a, b + c)
        assert torch.equal(a[c == 0], b[c == 0])


def test_delta() -> None:
    p = problem(torch.bfloat16, storage="bshd")
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    exact = (out.double() * p.dout.double()).sum(dim=-1)
    assert error(ops.delta(out, p.dout), exact) <= 4 * ulp(exact, torch.float32)
    expanded = torch.randn(2, 4, 1).expand(lse.shape)
    for dlse in (p.dlse, expanded):
        assert dlse is not None
        best = exact - dlse
        assert error(ops.delta(out, p.dout, dlse), best) <= 4 * ulp(best, torch.float32)


def test_sink_gradient_is_the_operators() -> None:
    p = problem(torch.float32, sinks=True)
    assert p.sinks is not None
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, p.sinks, p.scale)
    assert torch.equal(ops.sink_gradient(p.sinks, lse, ops.delta(out, p.dout, p.dlse)), ours(p)[5])


@pytest.mark.isa
def test_sink_gradient_of_many_rows() -> None:
    """More rows than a block of threads has."""
    assert_matches_reference(
        problem(torch.float32, causal, heads=2, q_len=203, k_len=9, head_dim=16, sinks=True)
    )


# --- invariants -------------------------------------------------------------------------------


@pytest.mark.isa
@each_dtype
@each_mask
def test_invariants(mask: Any, dtype: torch.dtype) -> None:
    """sum dv = sum dout over rows that see a key; sum <q, dq> = sum <k, dk> per K/V head.

    The first holds because the weights of a row sum to one (no sink), the second because scores
    depend on q and k through q.k alone. Summed in float64, with the rounding of each gradient as
    the bound.
    """
    p = problem(dtype, mask, q_len=83, k_len=91, softcap=4.0)
    _, _, dq, dk, dv = (x.double() for x in ours(p))
    seen = p.visible.any(dim=-1).expand(2, -1)[:, None, :, None]
    dout = p.dout.double().masked_fill(~seen, 0.0)
    by_head = dout.unflatten(1, (2, 2)).sum(dim=(2, 3))
    eps = torch.finfo(dtype).eps
    slack = eps * (dv.abs().sum(dim=2) + dout.abs().unflatten(1, (2, 2)).sum(dim=(2, 3)))
    assert ((dv.sum(dim=2) - by_head).abs() <= slack).all()
    qdq, kdk = p.q.double() * dq, p.k.double() * dk
    difference = qdq.unflatten(1, (2, 2)).sum(dim=(2, 3, 4)) - kdk.sum(dim=(2, 3))
    slack = eps * (qdq.abs().unflatten(1, (2, 2)).sum(dim=(2, 3, 4)) + kdk.abs().sum(dim=(2, 3)))
    assert (difference.abs() <= slack).all()
    assert (dq.abs().amax(dim=(2, 3)) > 0).all() and (dv.abs().amax(dim=(2, 3)) > 0).all()


@pytest.mark.isa
@each_dtype
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    # The last block of the cut is two chunks of keys for the CPU's backward.
    lengths = {"q_len": long(531, 150), "k_len": long(3300, 300)}
    p = problem(dtype, first_and_window, batch=1, sinks=True, **lengths)
    cut = [[b] for b in blocks(p, (lengths["k_len"] // 3, lengths["k_len"] // 3 + 11))]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2) if ON_VIRTUAL_GPU else (1, 2, 3, 1, 3):
            torch.set_num_threads(count)
            results.append([*ours(p), *folded(p, cut), *gradients(p, cut)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)
