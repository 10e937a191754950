# SPDX-License-Identifier: BSD-3-Clause
"""Heads dealt to neighbours around a ring: exact for every mask and layout, or refused."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from ring_attention import RingError, agree, attention, trace
from ring_attention.layout import LAYOUTS, Contiguous, Layout, Striped, Zigzag
from ring_attention.mask import Causal, Documents, Full, KeyLength, Mask, Window
from ring_attention.merged import Merged, rows_of
from ring_attention.plan import plan
from ring_attention.virtual import run_virtual
from ring_cases import Case, Results, assert_exact, join, run_rank
from strategies import layouts

LENGTH = 61
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(11, 0),
    "documents": Causal() & Documents((0, 5, 6, 41, 61)),
}
# (ranks, arguments of plan)
SPLITS: list[tuple[int, dict[str, Any]]] = [
    (2, {"ulysses": 2}),
    (4, {"ulysses": 2}),
    (4, {"ulysses": 4}),
    (6, {"ulysses": 2, "resident": 2}),
    (6, {"ulysses": 3}),
    (8, {"ulysses": 2, "ranks_per_node": 4}),
    (8, {"ulysses": 4, "ranks_per_node": 4}),
    (8, {"ulysses": 2, "generator": "chain"}),
]


# --- The merged layout ----------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=100)
def test_merged_ranks_hold_what_their_members_hold(data: st.DataObject) -> None:
    degree, ranks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    base = data.draw(layouts(data.draw(st.integers(0, 70)), degree * ranks))
    merged = Merged.of(base, degree)
    for rank in range(ranks):
        members = range(rank * degree, (rank + 1) * degree)
        want = torch.cat([base.positions(r) for r in members]).sort().values
        assert torch.equal(merged.positions(rank), want)
        assert merged.sizes[rank] == len(want)
        for member in members:
            ranges, index = rows_of(base, degree, member)
            assert torch.equal(want[index], base.positions(member))
            assert [i for a, b in ranges for i in range(a, b)] == index.tolist()
    assert Layout.from_dict(json.loads(json.dumps(merged.to_dict()))) == merged


@pytest.mark.parametrize("make", LAYOUTS)
def test_merged_shards_are_few_runs(make) -> None:
    """What a ring of plain shards of the same size would have: planning stays as quick."""
    assert len(Merged.of(make(1 << 20, 64), 8).runs(3)) <= 2


# --- Attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("make", [Contiguous, Zigzag, Striped])
@pytest.mark.parametrize("world_size,schedule", SPLITS, ids=str)
def test_exact_on_virtual_ranks(
    world_size: int, schedule: dict[str, Any], make: Any, mask: str
) -> None:
    heads = 2 * schedule["ulysses"]
    case = Case(LENGTH, mask=MASKS[mask], heads=2 * heads, kv_heads=heads, sinks=True)
    layout = make(LENGTH, world_size)
    got = run_virtual(world_size, run_rank, case, layout, None, schedule)
    assert_exact(join(got, layout), case)


@pytest.mark.parametrize(
    "case",
    [
        Case(LENGTH, heads=6, kv_heads=6, dtype=torch.bfloat16, head_dim=32),
        Case(LENGTH, heads=2, v_head_dim=40, softcap=2.0),
        Case(LENGTH, batch=2, mask=Causal() & KeyLength((61, 23))),
        Case(5, heads=4),
    ],
    ids=["bf16", "dv != dqk, softcap", "key length", "empty shards"],
)
def test_exact_for_every_argument(case: Case) -> None:
    layout = Zigzag(case.q_len, 6)
    got = run_virtual(6, run_rank, case, layout, None, {"ulysses": 2})
    assert_exact(join(got, layout), case)


def test_cross_attention_with_two_layouts() -> None:
    case = Case(29, k_len=LENGTH, mask=Causal(bottom_right=True), heads=4)
    q_layout, k_layout = Contiguous(29, 4), Striped(LENGTH, 4, block=2)
    parts = run_virtual(4, run_rank, case, q_layout, k_layout, {"ulysses": 2})
    assert_exact(join(parts, q_layout, k_layout), case)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("degree", [2, 4])
def test_processes_and_virtual_ranks_agree_to_the_bit(pools, degree: int, mask: str) -> None:
    case = Case(LENGTH, heads=8, kv_heads=4, dtype=torch.bfloat16, mask=MASKS[mask])
    layout = Zigzag(LENGTH, 4)
    real = pools(4).run(run_rank, case, layout, None, {"ulysses": degree})
    virtual = run_virtual(4, run_rank, case, layout, None, {"ulysses": degree})
    assert_exact(join(real, layout), case)
    for mine, theirs in zip(real, virtual, strict=True):
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def in_mesh(world: Any, case: Case) -> Results:
    layout = Zigzag(LENGTH, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    assert plan(case.mask, layout, group=mesh).ulysses == 2
    results = run_rank(mesh, case, layout)
    again = run_rank(dist.group.WORLD, case, layout, None, {"ulysses": 2})
    assert all(torch.equal(results[name], again[name]) for name in results)
    nodes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inter", "intra"))
    double = plan(case.mask, layout, group=nodes)
    assert (double.generator, double.ranks_per_node, double.ulysses) == ("double", 2, 1)
    inside = run_rank(nodes, case, layout)
    again = run_rank(dist.group.WORLD, case, layout, None, {"ranks_per_node": 2})
    assert all(torch.equal(inside[name], again[name]) for name in results)
    three = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("inter", "intra", "ulysses"))
    assert plan(case.mask, layout, group=three).ring.generator == "direct"
    return results


def test_device_mesh(pools) -> None:
    case = Case(LENGTH, heads=4)
    assert_exact(join(pools(4).run(in_mesh, case), Zigzag(LENGTH, 4)), case)


def test_out_keeps_the_dimension_order_of_q() -> None:
    layout = Contiguous(12, 4)

    def rank(group: Any) -> tuple[int, ...]:
        made = plan(Causal(), layout, group=group, ulysses=2)
        q = torch.randn(1, 3, 4, 16).transpose(1, 2)
        k = torch.randn(1, 4, 3, 16)
        out = attention(q, k, k, plan=made, group=group)
        return out.stride()

    assert run_virtual(4, rank) == [(192, 16, 64, 1)] * 4


def test_bytes_are_those_of_the_arithmetic() -> None:
    """q, k, v and out: of each own row, all heads but the share that stays."""
    case = Case(64, heads=8, kv_heads=4, mask=Full())
    layout = Contiguous(64, 4)
    with trace.record() as events:
        run_virtual(4, run_rank, case, layout, None, {"ulysses": 4})
    row = (8 + 4 + 4 + 8) * 16 * 4 + 8 * 4  # q, k, v, out and lse
    for phase in ("forward", "backward"):
        for rank in range(4):
            posted = [e.bytes for e in events if (e.rank, e.phase, e.name) == (rank, phase, "post")]
            assert sum(posted) == 2 * 16 * row * 3 // 4  # sent and received


# --- Agreement and refusals -----------------------------------------------------------------------


def test_agreed_calls_post_at_once() -> None:
    def rank(group: Any) -> int:
        case, layout = Case(16, heads=4), Zigzag(16, 4)
        made = plan(case.mask, layout, group=group, ulysses=2)
        q, k, v = (layout.shard(case.tensors()[n], group, dim=2) for n in "qkv")
        agree(made, group, q, k, v)
        calls = group.book.calls
        attention(q, k, v, plan=made, group=group)
        assert group.rings[2].book.calls == 0
        return group.book.calls - calls

    assert run_virtual(4, rank) == [0] * 4


def test_ranks_that_split_differently_are_told() -> None:
    def rank(group: Any) -> None:
        degree = 4 if group.rank == 3 else 2
        run_rank(group, Case(16, heads=4, kv_heads=4), Zigzag(16, 4), None, {"ulysses": degree})

    with pytest.raises(RingError, match="ranks disagree about plan"):
        run_virtual(4, rank)


def refused(group: Any, heads: int, kv_heads: int) -> None:
    case = Case(16, heads=heads, kv_heads=kv_heads)
    run_rank(group, case, Zigzag(16, 8), None, {"ulysses": 4})


@pytest.mark.parametrize("heads,kv_heads,fits", [(8, 2, "(8, 1), (4, 2)"), (6, 3, "(8, 1)")])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, fits: str) -> None:
    with pytest.raises(ValueError) as error:
        run_virtual(8, refused, heads, kv_heads)
    message = f"a multiple of the Ulysses degree 4, got {kv_heads} (for {heads} heads)"
    assert message in str(error.value) and str(error.value).endswith(f"(ring, ulysses) = {fits}")


def test_splits_that_do_not_fit_are_refused() -> None:
    layout = Zigzag(16, 6)
    with pytest.raises(ValueError, match=r"expected ulysses of \[1, 2, 3, 6\], got 4"):
        plan(Causal(), layout, rank=0, ulysses=4)
    with pytest.raises(ValueError, match="expected ulysses to divide ranks_per_node = 3, got 2"):
        plan(Causal(), layout, rank=0, ulysses=2, ranks_per_node=3)
    with pytest.raises(ValueError, match=r"expected ranks_per_node of \[3\] with double, got 2"):
        plan(Causal(), layout, rank=0, ulysses=2, ranks_per_node=4)
