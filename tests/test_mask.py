# SPDX-License-Identifier: BSD-3-Clause
"""Masks: their interval tables against the dense definition, and that against hand-written ones."""

from __future__ import annotations

import doctest
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ring_attention.mask
import ring_attention.mask_algebra
import ring_attention.mask_ranges
from ring_attention._planner import Segments
from ring_attention.mask import (
    MASKS,
    And,
    Causal,
    Chunks,
    Documents,
    FirstTokens,
    Full,
    KeyLength,
    Mask,
    Or,
    PrefixLM,
    Spans,
    Window,
)
from strategies import masks


def from_intervals(mask: Mask, q_len: int, k_len: int) -> Tensor:
    """The mask as bool [B or 1, q_len, k_len] from its intervals, which must be disjoint."""
    lo, hi = mask.intervals(q_len, k_len)
    assert lo.dtype == hi.dtype == torch.int64 and lo.shape[2] == q_len
    assert bool(((lo >= 0) & (lo <= hi) & (hi <= k_len)).all())
    keys = torch.arange(k_len)
    counts = ((lo[..., None] <= keys) & (keys < hi[..., None])).sum(0)
    assert bool((counts <= 1).all())
    return counts.bool()


def by_hand(q_len: int, k_len: int, sees: Callable[[int, int], bool]) -> Tensor:
    rows = [[sees(q, k) for k in range(k_len)] for q in range(q_len)]
    return torch.tensor(rows, dtype=torch.bool).reshape(q_len, k_len)


# What each mask means, in plain Python and apart from the package's own definition.
MEANINGS: list[tuple[Mask, int, int, Callable[[int, int], bool]]] = [
    (Full(), 3, 4, lambda q, k: True),
    (Causal(), 6, 4, lambda q, k: k <= q),
    (Causal(), 4, 6, lambda q, k: k <= q),
    (Causal(bottom_right=True), 3, 7, lambda q, k: k <= q + 4),
    (Causal(bottom_right=True), 7, 3, lambda q, k: k <= q - 4),
    (Causal(bottom_right=True) & KeyLength(5), 3, 7, lambda q, k: k < 5 and k <= q + 2),
    (Window(2, 0), 7, 7, lambda q, k: q - 2 <= k <= q),
    (Window(0, 0), 7, 7, lambda q, k: k == q),
    (Window(1, 3), 7, 5, lambda q, k: q - 1 <= k <= q + 3),
    (Window(None, 1), 5, 7, lambda q, k: k <= q + 1),
    (Window(1, None), 5, 7, lambda q, k: k >= q - 1),
    (Window(None, None), 5, 7, lambda q, k: True),
    (Window(1, 0, bottom_right=True), 3, 8, lambda q, k: q + 4 <= k <= q + 5),
    (PrefixLM(3), 6, 6, lambda q, k: k <= q or (q < 3 and k < 3)),
    (PrefixLM(5), 3, 6, lambda q, k: k < 5),
    (PrefixLM(0), 4, 4, lambda q, k: k <= q),
    (FirstTokens(2), 4, 5, lambda q, k: k < 2),
    (KeyLength(3), 4, 5, lambda q, k: k < 3),
    (Chunks(3), 8, 8, lambda q, k: q // 3 == k // 3),
    (Chunks(3), 4, 8, lambda q, k: q // 3 == k // 3),
    (Chunks(1), 4, 4, lambda q, k: q == k),
    (Documents([0, 2, 2, 5]), 5, 5, lambda q, k: (q < 2) == (k < 2)),
    (Documents([0, 2, 5], [0, 1, 3]), 5, 3, lambda q, k: (q < 2) == (k < 1)),
    (Documents([0, 2, 5], padding=[[1]]), 5, 5, lambda q, k: q < 2 and k < 2),
    (Spans([(1, 3), (3, 4)]), 5, 5, lambda q, k: {q, k} <= {1, 2} or q == k == 3),
    (Causal() | Spans([(1, 4)]), 5, 5, lambda q, k: k <= q or {q, k} <= {1, 2, 3}),
    (Causal() & Chunks(2), 5, 5, lambda q, k: k <= q and q // 2 == k // 2),
    (
        Causal() & (FirstTokens(2) | Window(1, 0)),
        8,
        8,
        lambda q, k: k <= q and (k < 2 or k >= q - 1),
    ),
]


@pytest.mark.parametrize("mask,q_len,k_len,sees", MEANINGS, ids=lambda v: repr(v)[:60])
def test_meaning(mask: Mask, q_len: int, k_len: int, sees: Callable[[int, int], bool]) -> None:
    want = by_hand(q_len, k_len, sees)
    assert torch.equal(mask.dense(q_len, k_len)[0], want)
    assert torch.equal(from_intervals(mask, q_len, k_len)[0], want)


@settings(max_examples=400)
@given(data=st.data())
def test_intervals_are_the_dense_mask(data: st.DataObject) -> None:
    q_len = data.draw(st.integers(0, 40))
    k_len = data.draw(st.one_of(st.just(q_len), st.integers(0, 40)))
    mask = data.draw(masks(q_len, k_len))
    dense = mask.dense(q_len, k_len)
    assert dense.shape == (mask.batch, q_len, k_len)
    assert torch.equal(from_intervals(mask, q_len, k_len).expand_as(dense), dense)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_values(mask: Mask) -> None:
    """Equal masks are equal however they were made, and survive JSON, pickle and eval(repr)."""
    again = Mask.from_dict(json.loads(json.dumps(mask.to_dict())))
    assert again == mask and hash(again) == hash(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert eval(repr(mask)) == mask
    assert mask != Documents([0, 1]) and mask in {mask}


def test_equal_however_written() -> None:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert Documents(cu) == Documents((0, 2, 5)) == Documents([[0, 2, 5]])
    assert Documents([0, 2, 5]) == Documents.from_ids([4, 4, 1, 1, 1])
    assert Documents([0, 2, 5]) == Documents.from_positions(torch.tensor([0, 1, 0, 1, 2]))
    assert Documents([0, 2, 5], [0, 2, 5]) == Documents([0, 2, 5])
    assert KeyLength(torch.tensor([3, 4])) == KeyLength([3, 4]) and KeyLength(3) == KeyLength([3])
    assert (Full() & Causal()) & Chunks(2) == And((Full(), Causal(), Chunks(2)))
    assert Full() | (Causal() | Chunks(2)) == Or((Full(), Causal(), Chunks(2)))
    assert PrefixLM(3) != KeyLength(3) and Window(3, 0) != Window(2, 0)


def test_documents_per_sample() -> None:
    ids = torch.tensor([[0, 0, 5, 5, 5], [3, 1, 1, -1, -1]])
    mask = Causal() & Documents.from_ids(ids)
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    assert mask.batch == 2
    assert torch.equal(mask.dense(5, 5), same & Causal().dense(5, 5))
    assert torch.equal(from_intervals(mask, 5, 5), mask.dense(5, 5))
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]])
    assert Documents.from_positions(positions) == Documents([[0, 2, 5], [0, 1, 5]])
    assert Documents.from_ids(torch.zeros(2, 0, dtype=torch.int64)) == Documents([[0], [0]])


def test_samples_that_agree_share_a_table() -> None:
    assert Documents([[0, 2, 5], [0, 2, 5]]).intervals(5, 5)[0].shape == (1, 1, 5)
    assert Documents([[0, 2, 5], [0, 3, 5]]).intervals(5, 5)[0].shape == (1, 2, 5)


def test_tables_stay_small() -> None:
    """Segments, not tokens: the table's size does not grow with the length."""
    n = 1 << 30
    few: list[tuple[Mask, int]] = [
        (Full(), 1),
        (Causal(), 1),
        (Causal() & Window(4095, 0), 2),
        (Causal() & (FirstTokens(4) | Window(1023, 0)), 3),
        (Causal() & Documents([0, 5, n]), 2),
        (Causal() | Spans([(10, 20)]), 3),
        (PrefixLM(100), 2),
        (Causal() & KeyLength(n - 7), 2),
        (Causal() & Chunks(1 << 28), 4),
    ]
    for mask, segments in few:
        assert len(mask.segments(n, n)[0]) <= segments + 1, mask


def test_lines_that_only_touch_stay_apart() -> None:
    """A level and a rising bound that agree on one row, where the segments meet."""
    rows = [[0, 4, 0, 0, 4, 0], [4, 8, 0, 0, 0, 1]]
    assert Segments(8, 8, [tuple(row) for row in rows]).tuples() == rows


def test_too_many_intervals() -> None:
    """Three intervals are refused, but only if they are left when the mask is complete."""
    keys_3_and_4 = Documents([0, 0, 20, 20], [0, 3, 5, 20])
    mask = FirstTokens(1) | Window(0, 0) | keys_3_and_4
    with pytest.raises(
        ValueError, match=r"at most 2 key intervals per query row, got 3 for query position 6 of"
    ):
        mask.segments(20, 20)
    assert torch.equal(from_intervals(mask & Chunks(6), 20, 20), (mask & Chunks(6)).dense(20, 20))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Window(-1, 0), r"Window: expected an integer left >= 0, got -1; .*None"),
    (lambda: Window(1.5, 0), r"Window: expected an integer left >= 0, got 1.5"),
    (lambda: FirstTokens(-2), r"FirstTokens: .*count >= 0, got -2"),
    (lambda: Chunks(0), r"Chunks: .*size >= 1, got 0"),
    (lambda: KeyLength([]), r"KeyLength: .*at least one"),
    (lambda: KeyLength([3, -1]), r"KeyLength: .*lengths >= 0, got -1"),
    (lambda: KeyLength(torch.tensor([1.5])), r"KeyLength: .*got 1.5"),
    (lambda: KeyLength(9).segments(4, 8), r"KeyLength: expected lengths <= 8, got 9"),
    (lambda: PrefixLM("long"), r"PrefixLM: .*got 'l'"),
    (lambda: Documents([1, 4]), r"Documents: .*cu_seqlens that starts at 0"),
    (lambda: Documents([0, 4, 2]), r"Documents: .*ascends"),
    (lambda: Documents([]), r"Documents: "),
    (lambda: Documents([0, 4], [0, 1, 4]), r"as many documents"),
    (lambda: Documents([0, 4]).dense(5, 5), r"end at q_len = 5, got 4"),
    (lambda: Documents([0, 4]).segments(4, 5), r"end at k_len = 5, got 4"),
    (lambda: Documents.from_ids([0, 1, 0]), r"from_ids: .*next to each other, got id 0"),
    (lambda: Documents.from_ids(torch.rand(3)), r"from_ids: expected integers"),
    (lambda: Documents.from_positions([0, 1, 6, 7]), r"got position id 6 at 2.*before sharding"),
    (lambda: Documents.from_positions([1, 2]), r"got position id 1 at 0"),
    (lambda: Spans([(0, 3), (2, 5)]), r"Spans: expected disjoint"),
    (lambda: Spans([(3, 1)]), r"Spans: expected disjoint"),
    (lambda: KeyLength([1, 2]) & KeyLength([1, 2, 3]), r"one batch size.*got batch sizes \[2, 3\]"),
    (lambda: Causal().intervals(-1, 4), r"q_len >= 0, got -1"),
    (lambda: Mask.from_dict({"mask": "Nope"}), r"Mask.from_dict: expected a mask of"),
]


@pytest.mark.parametrize("bad,message", BAD, ids=[message for _, message in BAD])
def test_refusals(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


def test_combining_with_other_values() -> None:
    with pytest.raises(TypeError):
        Causal() & torch.ones(3, 3)  # type: ignore[operator]


def test_segments_refuse_disorder() -> None:
    with pytest.raises(ValueError, match="sorted and disjoint"):
        Segments(8, 8, [(0, 4, 0, 0, 8, 0), (2, 6, 0, 0, 8, 0)])
    with pytest.raises(ValueError, match="slope"):
        Segments(8, 8, [(0, 4, 0, 2, 8, 0)])
    with pytest.raises(ValueError, match="different lengths"):
        Segments(8, 8, []) & Segments(8, 9, [])


@pytest.mark.parametrize(
    "module", [ring_attention.mask, ring_attention.mask_algebra, ring_attention.mask_ranges]
)
def test_examples(module: Any) -> None:
    names = {**vars(ring_attention.mask), "torch": torch}
    assert doctest.testmod(module, extraglobs=names).failed == 0
