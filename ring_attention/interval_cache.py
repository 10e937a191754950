# SPDX-License-Identifier: BSD-3-Clause
"""Key intervals, as the kernels take them, kept from call to call and moved to a device once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _planner
from .device_copy import DeviceCopy

# Key intervals that a plan keeps; with more, the least recently used are computed again. What
# CUDA graphs read stays.
INTERVAL_CACHE_BYTES = 64 << 20
# An origin, a device, a range of keys.
Key = tuple[int, torch.device, tuple[int, int] | None]


@dataclass(frozen=True)
class Cached:
    copy: DeviceCopy
    begin: Tensor  # views of the copy
    end: Tensor


def key_intervals(reads: _planner.Reads, reader: int, origin: int, held: _planner.Ranges) -> Tensor:
    """What all queries of a rank see of the rows held of a block of keys.

    Returns:
        begins and ends, int32 [2, n, B or 1, q_len], or [..., 1] if all rows are alike.
    """
    view = reads.key_intervals(reader, origin, held)
    both = torch.empty(2, view.most, reads.samples, view.rows, dtype=torch.int32, device="cpu")
    used = view.fill(both[0].data_ptr(), both[1].data_ptr())
    return both[:, :used].clone() if used < view.most else both


def clipped(both: Tensor, keys: tuple[int, int] | None) -> Tensor:
    """Begins and ends, in place, as far as they lie in a range of keys."""
    if keys is not None:
        both[0].clamp_(min=keys[0])
        both[1].clamp_(max=keys[1])
    return both


class IntervalCache:
    """Intervals, least recently used first out; shared by the threads of a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: OrderedDict[Key, Cached] = OrderedDict()

    def get(self, key: Key) -> tuple[Tensor, Tensor] | None:
        with self.lock:
            if key not in self.kept:
                return None
            self.kept.move_to_end(key)
            cached = self.kept[key]
            cached.copy.get()
            return cached.begin, cached.end

    def put(self, key: Key, both: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        copy = DeviceCopy(both, key[1])
        begin, end = copy.get().expand(*both.shape[:3], rows)
        with self.lock:
            self.kept[key] = Cached(copy, begin, end)
            for old in list(self.kept)[:-1]:
                if self.nbytes() <= INTERVAL_CACHE_BYTES:
                    break
                if not self.kept[old].copy.captured:
                    del self.kept[old]
        return begin, end

    def nbytes(self) -> int:
        return sum(cached.copy.nbytes for cached in self.kept.values())
