# SPDX-License-Identifier: BSD-3-Clause
"""Message buffers, leased from a bounded pool so that a ring's memory does not depend on P."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

# Idle buffers kept per pool: two K/V in flight, an outgoing one, and the gradients of the backward.
_IDLE_BUFFERS = 6


@dataclass(frozen=True, eq=False)
class Lease:
    """A flat buffer on loan: `flat` is its first elements, `raw` the bytes that go back."""

    flat: Tensor
    raw: Tensor


class BufferPool:
    """Flat buffers of one group. A buffer on loan is never shared; a lost lease is simply freed.

    A communication that failed may still write into its buffers, so an error path never gives
    back: the garbage collector frees them when the backend lets go.
    """

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self._lock = threading.Lock()

    def lease(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Lease:
        """A flat uninitialised buffer of `numel` elements on `like`'s device."""
        dtype = dtype or like.dtype
        nbytes = numel * dtype.itemsize
        with self._lock:
            # Best fit, but never more than twice the need: the pool must not hoard large buffers.
            fits = [
                raw
                for raw in self._idle
                if raw.device == like.device and nbytes <= raw.numel() <= 2 * nbytes
            ]
            raw = min(fits, key=Tensor.numel) if fits else None
            if raw is not None:
                self._idle = [other for other in self._idle if other is not raw]
        if raw is None:
            raw = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return Lease(raw[:nbytes].view(dtype), raw)

    def give_back(self, lease: Lease) -> None:
        """Returns a buffer whose messages are complete."""
        with self._lock:
            self._idle = [*self._idle, lease.raw][-_IDLE_BUFFERS:]

    @property
    def idle_bytes(self) -> int:
        """Bytes held for reuse."""
        with self._lock:
            return sum(raw.numel() for raw in self._idle)
