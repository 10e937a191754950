# SPDX-License-Identifier: BSD-3-Clause
"""What queries see of the blocks that a rank holds, and what is kept of it."""

from __future__ import annotations

import pytest
import torch

from ring_attention import interval_cache
from ring_attention.layout import Contiguous, Striped, Zigzag
from ring_attention.mask import (
    Causal,
    Full,
    KeyLength,
)
from ring_attention.plan import plan


def test_uniform_rows_take_no_memory() -> None:
    p = plan(Full(), Zigzag(1 << 20, 4), rank=1)
    for origin in range(4):
        begin, end = p.intervals(origin)
        assert begin.shape == (1, 1, 1 << 18) and begin.stride(2) == end.stride(2) == 0
        assert begin.untyped_storage().nbytes() <= 64
        assert int(begin[0, 0, 0]) == 0 and int(end[0, 0, 0]) == 1 << 18
    padded = plan(KeyLength([5, 7]), Contiguous(16, 2), rank=1).intervals(0)
    assert [t[0, :, 0].tolist() for t in padded] == [[0, 0], [5, 7]] and padded[0].stride(2) == 0


def test_interval_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    p = plan(Causal(), Striped(4096, 8), rank=7)
    one = p.intervals(0)
    assert p.intervals(0)[0] is one[0]
    each = one[0].untyped_storage().nbytes()  # of begin and end
    monkeypatch.setattr(interval_cache, "INTERVAL_CACHE_BYTES", 3 * each)
    for origin in range(8):
        p.intervals(origin)
    assert [origin for origin, _, _ in p._cache.kept] == [5, 6, 7]
    again = p.intervals(0)
    assert again[0] is not one[0] and torch.equal(again[0], one[0])


def test_what_a_graph_has_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    p = plan(Causal(), Striped(4096, 8), rank=7)
    each = p.intervals(0)[0].untyped_storage().nbytes()
    p.intervals(1)
    next(iter(p._cache.kept.values())).copy.captured = True
    monkeypatch.setattr(interval_cache, "INTERVAL_CACHE_BYTES", 3 * each)
    for origin in range(1, 8):
        p.intervals(origin)
    assert [origin for origin, _, _ in p._cache.kept] == [0, 6, 7]


def test_intervals_and_rows_are_moved_to_a_device_once() -> None:
    p = plan(Causal(), Striped(4096, 8), rank=7)
    device = torch.device("meta")
    begin, end = p.intervals(0, device)
    assert begin.device == end.device == device and begin.shape == p.intervals(0)[0].shape
    assert p.intervals(0, device)[0] is begin and p.intervals(0)[0].device.type == "cpu"
    transfer = p.steps[0].sends[0]
    assert transfer.index(device) is transfer.index(device)
    assert transfer.index().device.type == "cpu"


def test_intervals_of_some_keys() -> None:
    p = plan(Causal(), Contiguous(12, 2), rank=0)
    begin, end = p.intervals(0)
    for keys in ((0, 2), (2, 6)):
        some = p.intervals(0, keys=keys)
        assert torch.equal(some[0], begin.clamp(min=keys[0]))
        assert torch.equal(some[1], end.clamp(max=keys[1]))
