# SPDX-License-Identifier: BSD-3-Clause
"""The operators: rows and keys that do not count, and values at the edge of what a dtype holds."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bounds import assert_matches_reference
from conftest import ON_VIRTUAL_GPU
from intervals import (
    GAPS,
    causal,
    each_mask,
    far_apart,
    full,
    jumps,
    late,
    one_row_differs,
    one_row_sees,
    padded,
    scattered,
    scattered_pairs,
    shifted,
    turns,
)
from problems import each_dtype, each_low, long, ours, problem


@pytest.mark.isa
@each_dtype
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered)
    empty = ~p.visible.any(dim=-1)
    assert 0 < empty.sum() < empty.numel()
    out, lse, dq, _, _ = ours(p)
    assert (out.transpose(1, 2)[empty] == 0).all()
    assert (lse.transpose(1, 2)[empty] == -math.inf).all()
    assert (dq.transpose(1, 2)[empty] == 0).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", GAPS, ids=lambda m: m.__name__)
def test_keys_no_row_sees_do_not_count(mask: Any, garbage: float, dtype: torch.dtype) -> None:
    p = problem(dtype, mask, q_len=41, k_len=137)
    unseen = ~p.visible.any(dim=1)[0]
    assert unseen.sum() > 30 and unseen[60] and unseen[-1]
    clean, dirty = {}, {}
    for name in ("k", "v"):
        x = getattr(p, name)
        clean[name] = x.masked_fill(unseen[None, None, :, None], 0.0)
        dirty[name] = x.masked_fill(unseen[None, None, :, None], garbage)
    expected = ours(replace(p, **clean))
    for a, b in zip(ours(replace(p, **dirty)), expected, strict=True):
        assert torch.equal(a, b)
    assert (expected[3][:, :, unseen] == 0).all() and (expected[4][:, :, unseen] == 0).all()


@pytest.mark.isa
@each_low
def test_keys_between_any_two_rows_do_not_count(dtype: torch.dtype) -> None:
    """Each gap lies between other rows of a tile of 128, 32 of which see keys that no others do."""
    p = problem(dtype, jumps, batch=4, heads=1, kv_heads=1, q_len=128, k_len=90)
    unseen = ~p.visible.any(dim=1)
    assert unseen[:, 10:60].all()
    for x in (p.k, p.v):
        x.masked_fill_(unseen[:, None, :, None], math.nan)
    dirty = ours(p)
    for x in (p.k, p.v):
        x.nan_to_num_(nan=0.0)
    for a, b in zip(dirty, ours(p), strict=True):
        assert torch.equal(a, b)


@pytest.mark.isa
@each_low
@pytest.mark.parametrize(
    "mask", [late, one_row_differs, one_row_sees, shifted, turns], ids=lambda m: m.__name__
)
def test_what_is_found_out_about_many_rows(mask: Any, dtype: torch.dtype) -> None:
    """Which keys some rows see, and which all: reductions over rows, whose every step counts."""
    sizes = {late: (1, 40, 700), shifted: (6, 40, 150), turns: (2, 130, 150)}
    batch, q_len, k_len = sizes.get(mask, (12, 40, 128))
    shape = {"batch": batch, "q_len": q_len, "k_len": k_len}
    assert_matches_reference(problem(dtype, mask, heads=1, kv_heads=1, **shape))


@pytest.mark.isa
@each_low
def test_the_only_rows_of_many_to_see_keys(dtype: torch.dtype) -> None:
    """Keys look for their rows in groups of tiles: wherever in its group a row's tile is."""
    p = problem(dtype, far_apart, batch=1, heads=1, kv_heads=1, q_len=9300, k_len=16, head_dim=16)
    assert p.visible.any(dim=-1).sum() == 5
    assert_matches_reference(p)


@pytest.mark.isa
@each_low
@each_mask
def test_influence(mask: Any, dtype: torch.dtype) -> None:
    """Changing a key changes the rows that see it, and not a bit of the others."""
    p = problem(dtype, mask, q_len=45, k_len=71)
    before = ours(p)
    for j in (5, 44) if ON_VIRTUAL_GPU else (0, 5, 33, 44, 70):
        k, v = p.k.clone(), p.v.clone()
        k[:, :, j], v[:, :, j] = -100 * k[:, :, j], 1000 + v[:, :, j]
        after = ours(replace(p, k=k, v=v))
        sees = p.visible[:, :, j].expand(2, -1)
        for name, a, b in zip(("out", "lse", "dq"), before, after, strict=False):
            same = (a == b).reshape(2, 4, 45, -1).all(dim=-1).transpose(1, 2)
            assert same[~sees].all(), f"{name} of a row that does not see key {j} changed"
            if name == "out":
                assert not same[sees].any(), f"a row that sees key {j} did not change"
        # Keys seen by no row that sees j keep their gradients, too.
        apart = ~(p.visible & sees[..., None]).any(dim=1)
        for a, b in zip(before[3:5], after[3:5], strict=True):
            assert torch.equal(a.transpose(1, 2)[apart], b.transpose(1, 2)[apart])


@pytest.mark.isa
@each_low
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Not on what they see, nor on whether their scores make a tile fold twice."""
    p = problem(dtype, scattered, batch=1, heads=1, kv_heads=1, q_len=64, k_len=300, scale=1.0)
    alone = ours(p)
    others = torch.arange(64) % 3 != 0
    begin, end = scattered(1, 64, 300)
    q = p.q.clone()
    q[:, :, others] *= 40
    together = ours(
        replace(
            p,
            q=q,
            begin=torch.where(others, begin, p.begin),
            end=torch.where(others, end, p.end),
        )
    )
    for a, b in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(a[:, :, ~others], b[:, :, ~others])


@pytest.mark.isa
@each_dtype
def test_scratch_of_earlier_calls_does_not_matter(dtype: torch.dtype) -> None:
    p = problem(dtype, padded, q_len=75, k_len=131, head_dim=72)
    before = ours(p)
    nan = problem(dtype, full, q_len=long(300, 140), k_len=long(300, 140), head_dim=136)
    ours(replace(nan, q=torch.full_like(nan.q, math.nan), v=torch.full_like(nan.v, math.nan)))
    for a, b in zip(before, ours(p), strict=True):
        assert torch.equal(a, b)


@pytest.mark.isa
@each_dtype
def test_bounds_are_clamped(dtype: torch.dtype) -> None:
    p = problem(dtype, scattered_pairs)
    limit = torch.iinfo(torch.int32)
    begin = torch.where(p.begin <= 0, limit.min, p.begin).to(torch.int32)
    end = torch.where(p.end >= p.k.shape[2], limit.max, p.end).to(torch.int32)
    # Empty rows in every spelling.
    empty = p.begin[1] >= p.end[1]
    begin[1] = torch.where(empty, limit.max, begin[1])
    end[1] = torch.where(empty, limit.min, end[1])
    assert empty.any()
    for a, b in zip(ours(replace(p, begin=begin, end=end)), ours(p), strict=True):
        assert torch.equal(a, b)


# --- extreme values ---------------------------------------------------------------------------


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(("sign", "softcap"), [(1, 0.0), (-1, 0.0), (1, 50.0)])
def test_rising_and_falling_scores(sign: int, softcap: float, dtype: torch.dtype) -> None:
    """Every key beats all before it: a running maximum must move, and old weight must vanish."""
    shape = {"q_len": 150, "k_len": 150, "heads": 2, "kv_heads": 2}
    p = problem(dtype, causal, scale=1.0, softcap=softcap, **shape)
    rise = torch.linspace(0, 60, 150) * sign
    p.q[...] = 0.125
    p.k[...] = (rise[:, None] * 8 / 32).to(dtype)
    assert_matches_reference(p)


@pytest.mark.isa
@each_dtype
def test_peaked_softmax(dtype: torch.dtype) -> None:
    p = problem(dtype, full, q_len=33, k_len=129, scale=50.0, dlse=False)
    assert_matches_reference(p)
    assert (ours(p)[1] > 500).any()


@pytest.mark.isa
@each_low
def test_values_near_the_largest(dtype: torch.dtype) -> None:
    """The state is unnormalised, up to 2^24 times the output, and may not overflow."""
    p = problem(dtype, causal, q_len=113, k_len=113, dlse=False)
    largest = 65000.0 if dtype == torch.float16 else 1e28
    p.v.copy_(p.v.sign() * largest)
    p.dout.copy_(p.dout / largest if dtype != torch.float16 else p.dout / 64)
    assert_matches_reference(p)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_huge_scores(size: float, dtype: torch.dtype) -> None:
    """Scores whose neighbours in floating point are further apart than any exponent reaches."""
    p = problem(dtype, causal, q_len=70, k_len=70, dlse=False)
    size = min(size, 1e4 if dtype == torch.float16 else size)
    p.q.mul_(size), p.k.mul_(size)
    out, _, *gradients = ours(p)
    assert torch.isfinite(out).all() and all(torch.isfinite(x).all() for x in gradients)
    # One key has all the weight: powers of two, whose products and sums are exact.
    p.q.copy_(size), p.k.copy_(size)
    p.k[:, :, 5:] *= 2
    p.k[:, :, 9:] *= 2
    out, lse, *_ = ours(p)
    v = p.v.repeat_interleave(2, dim=1)
    assert torch.equal(out[:, :, 9], v[:, :, 9]) and torch.equal(out[:, :, 5], v[:, :, 5])
    assert torch.isfinite(lse).all()


@pytest.mark.isa
@each_dtype
def test_large_sinks(dtype: torch.dtype) -> None:
    p = problem(dtype, sinks=True)
    assert p.sinks is not None
    p.sinks.copy_(torch.tensor([80.0, -80.0, 1e4, -1e4]))
    assert_matches_reference(p)
