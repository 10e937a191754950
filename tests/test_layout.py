# SPDX-License-Identifier: BSD-3-Clause
"""Layouts are bijections for every length and world size; shard and unshard are exact inverses."""

from __future__ import annotations

import doctest
import json
import math
import pickle
import random
import time
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ring_attention.layout_base
import ring_attention.layout_documents
from ring_attention.groups import rank_of
from ring_attention.layout import (
    LAYOUTS,
    Contiguous,
    DocumentBalanced,
    Layout,
    Run,
    Striped,
    Zigzag,
)
from ring_attention.mask import Causal, Documents, Full, Window
from ring_attention.plan import plan
from ring_attention.virtual import run_virtual
from strategies import layouts


def check_bijection(layout: Layout) -> None:
    shards = [layout.positions(rank) for rank in range(layout.world_size)]
    for positions, size in zip(shards, layout.sizes, strict=True):
        assert positions.dtype == torch.int64 and len(positions) == size
        assert bool((positions[1:] > positions[:-1]).all())
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(layout.length))


@given(data=st.data(), length=st.integers(0, 90), world_size=st.integers(1, 9))
def test_bijection(data: st.DataObject, length: int, world_size: int) -> None:
    check_bijection(data.draw(layouts(length, world_size)))


@pytest.mark.parametrize("make", LAYOUTS)
def test_more_ranks_than_positions(make: Any) -> None:
    for length in (0, 1, 3):
        layout = make(length, 8)
        check_bijection(layout)
        assert layout.sizes.count(0) >= 8 - length


def test_who_holds_what() -> None:
    def all_positions(layout: Layout) -> list[list[int]]:
        return [layout.positions(rank).tolist() for rank in range(layout.world_size)]

    assert all_positions(Contiguous(7, 3)) == [[0, 1, 2], [3, 4], [5, 6]]
    assert all_positions(Zigzag(8, 2)) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert all_positions(Zigzag(9, 2)) == [[0, 1, 2, 7, 8], [3, 4, 5, 6]]
    assert all_positions(Striped(7, 2)) == [[0, 2, 4, 6], [1, 3, 5]]
    assert all_positions(Striped(11, 2, block=2)) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10]]


@pytest.mark.parametrize("make", LAYOUTS)
def test_sizes_are_even(make: Any) -> None:
    """No shard is more than a block (zigzag: two chunk remainders) longer than another."""
    for length in range(40, 61):
        layout = make(length, 4)
        if isinstance(layout, DocumentBalanced):  # even in work, bounded in tokens
            assert max(layout.sizes) <= layout.max_tokens == math.ceil(1.25 * length / 4)
        else:
            assert max(layout.sizes) - min(layout.sizes) <= 3


def packed(length: int, seed: int, median: int, sigma: float, *giants: int) -> list[int]:
    """cu_seqlens of documents with log-normal lengths and some giants, shuffled."""
    rng = random.Random(seed)
    lengths = list(giants)
    while (rest := length - sum(lengths)) > 0:
        lengths.append(min(rest, max(1, int(rng.lognormvariate(math.log(median), sigma)))))
    rng.shuffle(lengths)
    return [0, *accumulate(lengths)]


LENGTH = 1 << 19
DISTRIBUTIONS = {
    "log-normal": (1000, 1.5),
    "heavy tail": (500, 2.0),
    "one giant": (1000, 1.5, LENGTH // 10),
    "a few giants": (1000, 1.5, LENGTH // 4, LENGTH // 8, LENGTH // 8),
}


def pairs_and_rows(layout: Layout, mask: Any) -> tuple[list[int], list[int]]:
    """Per rank: visible pairs, and K/V rows sent."""
    plans = [plan(mask, layout, rank=rank) for rank in range(layout.world_size)]
    return [sum(p.flops) for p in plans], [sum(p.rows) for p in plans]


@pytest.mark.parametrize("world_size", [8, 16, 32, 64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_documents_are_balanced(name: str, world_size: int) -> None:
    """Within 5% of the mean work where zigzag and contiguous are at 1.7 times the mean and more."""
    for seed in range(2):
        cu = packed(LENGTH, seed, *DISTRIBUTIONS[name])
        mask = Causal() & Documents(cu)
        layout = DocumentBalanced(cu, world_size)
        pairs, rows = pairs_and_rows(layout, mask)
        assert sum(pairs) == sum(n * (n + 1) // 2 for n in map(int.__sub__, cu[1:], cu))
        assert max(pairs) * world_size <= 1.05 * sum(pairs)
        assert max(layout.sizes) <= layout.max_tokens <= 1.25 * LENGTH / world_size + 1
        # A ring that sends everything sends every row to all but one rank.
        assert sum(rows) <= 0.2 * LENGTH * (world_size - 1)
        others = [pairs_and_rows(kind(LENGTH, world_size), mask) for kind in (Zigzag, Contiguous)]
        for other_pairs, _ in others:
            assert max(other_pairs) * world_size > 1.3 * sum(pairs)


def test_short_documents_stay_whole_and_long_ones_are_zigzag() -> None:
    layout = DocumentBalanced([0, 800, 900, 1000, 1100, 1200], 4)
    owners = [
        {r for r in range(4) if bool(torch.isin(torch.arange(b, e), layout.positions(r)).any())}
        for b, e in ((0, 800), (800, 900), (900, 1000), (1000, 1100), (1100, 1200))
    ]
    assert len(owners[0]) == 4 and all(len(ranks) == 1 for ranks in owners[1:])
    assert len(set.union(*owners[1:])) == 4
    pairs, _ = pairs_and_rows(layout, Causal() & Documents(layout.cu_seqlens))
    assert max(pairs) * 4 <= 1.03 * sum(pairs)
    whole = DocumentBalanced([0, 5, 10, 15, 20], 4, slack=1)
    assert pairs_and_rows(whole, Full() & Documents(whole.cu_seqlens))[1] == [0, 0, 0, 0]


def test_a_window_makes_work_linear() -> None:
    cu = packed(LENGTH, 0, 1000, 1.5, LENGTH // 4)
    mask = Causal() & Window(511, 0) & Documents(cu)
    work = {}
    for window in (None, 512):
        pairs, _ = pairs_and_rows(DocumentBalanced(cu, 64, window=window), mask)
        work[window] = max(pairs) * 64 / sum(pairs)
    assert work[512] <= 1.05 < work[None]


@given(data=st.data(), length=st.integers(0, 300), world_size=st.integers(1, 9))
def test_tokens_are_bounded(data: st.DataObject, length: int, world_size: int) -> None:
    cuts = data.draw(st.lists(st.integers(0, length), max_size=20))
    slack = data.draw(st.sampled_from([1, 1.1, 1.25, 2.0, 100]))
    window = data.draw(st.sampled_from([None, 1, 7]))
    layout = DocumentBalanced([0, *sorted(cuts), length], world_size, slack, window)
    check_bijection(layout)
    assert max(layout.sizes) <= layout.max_tokens < slack * length / world_size + 1


def test_balancing_many_documents_is_quick() -> None:
    """10,000 documents on 4,096 ranks."""
    cu = packed(10_000_000, 0, 600, 1.0, 1_000_000)
    start_s = time.process_time()
    layout = DocumentBalanced(cu, 4096)
    assert len(cu) > 9000 and sum(layout.sizes) == 10_000_000
    assert time.process_time() - start_s < 5


@given(data=st.data(), length=st.integers(0, 40), world_size=st.integers(1, 5))
def test_shard(data: st.DataObject, length: int, world_size: int) -> None:
    layout = data.draw(layouts(length, world_size))
    dim = data.draw(st.integers(-3, 2))
    shape = [2, 3, 4]
    shape[dim] = length
    x = torch.randn(shape)
    for rank in range(world_size):
        want = x.movedim(dim, 0)[layout.positions(rank)].movedim(0, dim)
        assert torch.equal(layout.shard(x, rank, dim), want)
    both = {"ids": torch.arange(length)[None], "labels": -torch.arange(length)[None]}
    sharded = layout.shard(both, 0)
    assert sharded.keys() == both.keys()
    assert torch.equal(sharded["labels"][0], -layout.positions(0))


def round_trip(group: Any, layout: Layout, x: Tensor, weights: Tensor, dim: int) -> Any:
    """Shards, gathers and differentiates a loss that differs from rank to rank."""
    mine = layout.shard(x, group, dim).detach().requires_grad_()
    whole = layout.unshard(mine, group, dim)
    (whole * weights[rank_of(group)]).sum().backward()
    return whole.detach(), mine.grad


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("length,world_size", [(11, 1), (13, 2), (3, 4), (24, 3)])
def test_unshard(make: Any, length: int, world_size: int) -> None:
    layout = make(length, world_size)
    for dim in (1, -2):
        x = torch.randn(2, length, 3)
        weights = torch.randn(world_size, *x.shape)
        results = run_virtual(world_size, round_trip, layout, x, weights, dim)
        for rank, (whole, grad) in enumerate(results):
            assert torch.equal(whole, x)
            want = layout.shard(weights.sum(0), rank)
            torch.testing.assert_close(grad, want)


def test_unshard_over_gloo(pools: Any) -> None:
    layout = Zigzag(9, 2)
    x, weights = torch.randn(2, 9, 3), torch.randn(2, 2, 9, 3)
    for rank, (whole, grad) in enumerate(pools(2).run(round_trip, layout, x, weights, 1)):
        assert torch.equal(whole, x)
        torch.testing.assert_close(grad, layout.shard(weights.sum(0), rank))


@pytest.mark.parametrize("make", LAYOUTS)
def test_values(make: Any) -> None:
    layout = make(37, 4)
    assert layout.sizes  # caches must not get in the way of what follows
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout and hash(again) == hash(layout) and again.sizes == layout.sizes
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert eval(repr(layout)) == layout
    assert layout != make(38, 4) and layout != make(37, 5)
    assert Contiguous(8, 2) != Zigzag(8, 2)


def test_refusals() -> None:
    layout = Zigzag(8, 2)
    with pytest.raises(ValueError, match=r"Zigzag: expected an integer length >= 0, got -1"):
        Zigzag(-1, 2)
    with pytest.raises(ValueError, match=r"world_size >= 1, got 0"):
        Contiguous(8, 0)
    with pytest.raises(ValueError, match=r"Striped: expected an integer block >= 1, got 0"):
        Striped(8, 2, 0)
    with pytest.raises(
        ValueError, match=r"DocumentBalanced: expected cu_seqlens that ascend from 0"
    ):
        DocumentBalanced([0, 5, 4], 2)
    with pytest.raises(
        ValueError, match=r"DocumentBalanced: expected cu_seqlens that ascend from 0"
    ):
        DocumentBalanced([], 2)
    with pytest.raises(ValueError, match=r"expected slack >= 1, got 0.9; the ranks must hold all"):
        DocumentBalanced([0, 5], 2, slack=0.9)
    with pytest.raises(ValueError, match=r"expected an integer window >= 1, got 0"):
        DocumentBalanced([0, 5], 2, window=0)
    with pytest.raises(ValueError, match=r"Zigzag.shard: expected labels.shape\[1\] == 8, got sh"):
        layout.shard({"labels": torch.zeros(2, 7)}, 0)
    with pytest.raises(ValueError, match=r"expected x.shape\[3\] == 8, got shape \(2, 8\)"):
        layout.shard(torch.zeros(2, 8), 0, dim=3)
    with pytest.raises(ValueError, match=r"expected a tensor as name, got str"):
        layout.shard({"name": "text"}, 0)
    with pytest.raises(ValueError, match=r"expected a rank in \[0, 2\), got 2"):
        layout.positions(2)
    with pytest.raises(ValueError, match=r"expected a group of 2 ranks, got 1"):
        layout.shard(torch.zeros(2, 8), None)
    with pytest.raises(ValueError, match=r"Contiguous.unshard: expected x.shape\[1\] == 8, got"):
        Contiguous(8, 1).unshard(torch.zeros(2, 7), None)
    with pytest.raises(ValueError, match=r"Layout.from_dict: expected a layout of"):
        Layout.from_dict({"layout": "Nope"})


def test_a_broken_layout_is_refused() -> None:
    class Overlapping(Layout):
        def runs(self, rank: int) -> list[Run]:
            return [(0, 4, 1, 1), (2, 4, 1, 1)]

    class Short(Layout):
        def runs(self, rank: int) -> list[Run]:
            return [(rank, 1, 1, 1)]

    with pytest.raises(ValueError, match="ascend and do not overlap"):
        _ = Overlapping(8, 1).sizes
    with pytest.raises(ValueError, match="hold 2 rows, its length is 8"):
        _ = Short(8, 2).sizes
    for kind in ("Overlapping", "Short"):
        del Layout.kinds[kind]


def test_examples() -> None:
    names = {"torch": torch, "Zigzag": Zigzag, "Striped": Striped}
    for module in (ring_attention.layout_base, ring_attention.layout_documents):
        assert doctest.testmod(module, extraglobs=names).failed == 0
