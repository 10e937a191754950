# SPDX-License-Identifier: BSD-3-Clause
"""The operators against the float64 reference on the same rounded inputs.

Two bounds. The project's: the error of ours is at most twice the error of torch's own attention in
the same dtype (`test_error_is_at_most_twice_torchs`). And one for each single entry, for calls
that torch has no counterpart of: what rounding alone explains (`bounds.bounds`). Tests marked `isa`
are run again, in a process of their own, for every instruction set: `test_ops_isa.test_isa`.
"""

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bounds import assert_matches_reference, error, rms_error, ulp
from conftest import DEVICE
from intervals import MASKS, bottom_right, causal, descending, each_mask, first_and_window, full
from problems import (
    DTYPES,
    HEAD_DIMS,
    LOW,
    STORAGES,
    Problem,
    blocks,
    each_dtype,
    each_low,
    folded,
    gradients,
    long,
    ours,
    problem,
    theirs,
    torchs,
)
from ring_attention import ops

LENGTHS = [0, 1, 7, 113, 203]


@pytest.mark.isa
@each_low
@pytest.mark.parametrize(("mask", "head_dim"), [(causal, 128), *((mask, 64) for mask in MASKS)])
def test_error_is_at_most_twice_torchs(mask: Any, head_dim: int, dtype: torch.dtype) -> None:
    p = problem(dtype, mask, q_len=113, k_len=203, head_dim=head_dim, dlse=False)
    out, _, *grads = ours(p)

    def without_lse(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0], *tensors[2:]]

    exact, unfused = (without_lse(theirs(p, d)) for d in (torch.float64, dtype))
    names = ("out", "dq", "dk", "dv")
    for name, got, fused, plain, best in zip(
        names, (out, *grads), torchs(p), unfused, exact, strict=True
    ):
        assert rms_error(got, best) <= 2 * rms_error(fused, best), name
        # The largest of so many errors is a matter of luck too: torch's is that of its fused or, in
        # float32, of its plain attention. Where both are exact to the last place, that is allowed.
        luck = error(plain, best) if dtype == torch.float32 else 0.0
        bound = 2 * max(error(fused, best), luck, ulp(best, dtype))
        assert error(got, best) <= bound, f"{name}: {error(got, best):.3g} > {bound:.3g}"


@pytest.mark.isa
@each_low
def test_error_of_scores_beyond_a_hundred(dtype: torch.dtype) -> None:
    """P of the backward is the one that lse is the sum of, whatever a score's own rounding."""
    p = problem(dtype, full, q_len=130, k_len=150, head_dim=64, scale=0.4, dlse=False)
    p.q.copy_(p.q.abs() * p.q.sign()[..., :1])
    p.k.copy_(p.k.abs() * torch.linspace(0.25, 6.0, 150)[:, None])
    exact, plain = theirs(p, torch.float64), theirs(p, dtype)
    assert exact[1].abs().max() > 100
    got = ours(p)
    for i, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        mine, best = rms_error(got[i], exact[i]), rms_error(plain[i], exact[i])
        assert mine <= 2 * best, f"{name}: {mine / best:.2f} times torch's"


@pytest.mark.isa
@each_low
@pytest.mark.parametrize("mask", [first_and_window, descending], ids=lambda m: m.__name__)
def test_many_tiles(mask: Any, dtype: torch.dtype) -> None:
    """Longer than any tile or chunk of the kernels, and no multiple of one; so many that tiles have
    as many panels as they may, which see their first keys in either order."""
    lengths = {"q_len": long(523, 267), "k_len": long(775, 331)}
    heads = long(16, 2)
    assert_matches_reference(
        problem(dtype, mask, batch=1, heads=heads, kv_heads=1, head_dim=40, **lengths)
    )


@pytest.mark.isa
@each_low
@each_mask
def test_many_chunks(mask: Any, dtype: torch.dtype) -> None:
    """The backward's pairs of chunks, heads of a group that end within a pass of panels."""
    lengths = {"q_len": long(601, 141), "k_len": long(2301, 203)}
    assert_matches_reference(problem(dtype, mask, batch=2, heads=2, kv_heads=1, **lengths))


@pytest.mark.isa
@each_low
def test_few_queries_of_wide_values(dtype: torch.dtype) -> None:
    """All columns of the parts' states, in one fold and carried from one to the next."""
    p = problem(dtype, bottom_right, q_len=3, k_len=600, head_dim=16, v_head_dim=232, sinks=True)
    kv = blocks(p, (280,))
    for groups in ([kv], [kv, []]):
        assert_matches_reference(p, folded(p, groups))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("q_len", [1, 3, 70])
def test_few_queries_against_many_keys(q_len: int, dtype: torch.dtype) -> None:
    """Keys split into parts, whose states are combined; alone and carried from fold to fold."""
    k_len = long(4500, 1300)
    p = problem(dtype, bottom_right, q_len=q_len, k_len=k_len, head_dim=40, sinks=True)
    assert_matches_reference(p)
    kv = blocks(p, (k_len // 2, k_len // 2 + 3))
    for groups in ([kv], [kv[:1], kv[1:]], [kv[:2], kv[2:], []]):
        assert_matches_reference(p, folded(p, groups))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """Of few rows, which CUDA has a tile for, and of more; keys for all rows of a warp."""
    for q_len in (9, 35):
        assert_matches_reference(
            problem(dtype, batch=1, heads=2, kv_heads=1, q_len=q_len, k_len=35, head_dim=head_dim)
        )


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [(16, 256), (192, 128), (40, 72), (72, 40), (256, 16), (576 // 8, 64)],
)
def test_v_head_dim_differs(head_dim: int, v_head_dim: int, dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, head_dim=head_dim, v_head_dim=v_head_dim))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("q_len", LENGTHS)
@pytest.mark.parametrize("k_len", LENGTHS)
def test_lengths(q_len: int, k_len: int, dtype: torch.dtype) -> None:
    mask = bottom_right if q_len != k_len else causal
    assert_matches_reference(
        problem(dtype, mask, batch=1, heads=2, kv_heads=1, q_len=q_len, k_len=k_len, head_dim=24)
    )


def test_no_samples() -> None:
    p = problem(torch.float32, full, batch=0, sinks=True)
    results = ours(p)
    assert [x.shape[0] for x in results[:5]] == [0] * 5
    assert torch.equal(results[5], torch.zeros(4))
    assert folded(p, [[], blocks(p, (10,))])[0].shape == (0, 4, 37, 32)


@each_dtype
@each_mask
def test_masks(mask: Any, dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, mask, q_len=67, k_len=61, sinks=True))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (6, 1), (8, 2)], ids=str)
def test_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, heads=heads[0], kv_heads=heads[1], sinks=True))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("softcap", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_scale_sinks(softcap: float, sinks: bool, dtype: torch.dtype) -> None:
    assert_matches_reference(problem(dtype, softcap=softcap, sinks=sinks, scale=-0.4))


def test_sinks_of_minus_infinity_are_none() -> None:
    p = problem(torch.float32, sinks=True)
    assert p.sinks is not None
    p.sinks[1:3] = -math.inf
    assert_matches_reference(p)
    bare = ours(replace(p, sinks=None))
    for a, b in zip(ours(p)[:2], bare[:2], strict=True):
        assert torch.equal(a[:, 1:3], b[:, 1:3])


@each_dtype
@pytest.mark.parametrize("storage", STORAGES)
def test_memory_layouts(storage: str, dtype: torch.dtype) -> None:
    p = problem(dtype, storage=storage, sinks=True)
    assert_matches_reference(p)
    dense = replace(p, **{x: getattr(p, x).contiguous().clone() for x in ("q", "k", "v", "dout")})
    for a, b in zip(ours(p), ours(dense), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("storage", "order"),
    [("bhsd", (0, 1, 2)), ("bshd", (0, 2, 1)), ("sbhd", (2, 0, 1)), ("expanded", (0, 1, 2))],
)
def test_out_has_the_dimension_order_of_q(storage: str, order: tuple[int, ...]) -> None:
    p = problem(torch.bfloat16, storage=storage, v_head_dim=48)
    out, lse = ops.forward(p.q, p.k, p.v, p.begin, p.end, None, p.scale)
    assert out.permute(*order, 3).is_contiguous() and lse.is_contiguous()
    meta = [x.to("meta") for x in (p.q, p.k, p.v, p.begin, p.end)]
    meta[0] = torch.empty_strided(p.q.shape, p.q.stride(), dtype=p.q.dtype, device="meta")
    fake, fake_lse = ops.forward(*meta, None, p.scale)
    assert (fake.stride(), fake.dtype) == (out.stride(), out.dtype)
    assert (fake_lse.stride(), fake_lse.dtype) == (lse.stride(), lse.dtype)


@pytest.mark.isa
def test_offsets_beyond_32_bits() -> None:
    """Rows 2^25 elements apart: only their pages are ever touched."""
    p = problem(torch.bfloat16, full, batch=1, heads=1, kv_heads=1, q_len=70, k_len=75)
    try:
        memory = torch.empty(75 * 2**25, dtype=torch.bfloat16)
    except RuntimeError as refused:
        pytest.skip(f"no 5 GiB of address space: {refused}")
    far = {}
    for i, name in enumerate(("q", "k", "v", "dout")):
        x = getattr(p, name)
        strides = (0, 0, 2**25, 1)
        far[name] = memory.as_strided(x.shape, strides, storage_offset=i * 64).copy_(x)
    for a, b in zip(ours(replace(p, **far)), ours(p), strict=True):
        assert torch.equal(a, b)


# --- hypothesis -------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, list[int]]:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kv_heads = draw(st.integers(1, 3))
    k_len = draw(st.integers(0, 90))
    p = problem(
        draw(st.sampled_from(LOW if DEVICE.type == "cuda" else DTYPES)),
        draw(st.sampled_from(MASKS)),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=draw(st.integers(0, 90)),
        k_len=k_len,
        head_dim=draw(st.sampled_from(HEAD_DIMS[:16])),
        v_head_dim=draw(st.sampled_from(HEAD_DIMS[:16])),
        storage=draw(st.sampled_from(STORAGES)),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        dlse=draw(st.booleans()),
    )
    cuts = sorted(draw(st.lists(st.integers(0, k_len), max_size=3)))
    return p, cuts


@pytest.mark.isa
@given(problems())
@settings(max_examples=long(60, 15))
def test_any_problem(drawn: tuple[Problem, list[int]]) -> None:
    p, cuts = drawn
    assert_matches_reference(p)
    kv = [[b] for b in blocks(p, cuts)]
    assert_matches_reference(p, [*folded(p, kv), *gradients(p, kv)])
