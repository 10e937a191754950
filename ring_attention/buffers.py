# SPDX-License-Identifier: BSD-3-Clause
"""Message buffers, leased from a bounded pool so that a ring's memory does not depend on P.

Note [streams]. On CUDA a buffer is given back while kernels and messages that use it are still
queued. So it is lent again only on the stream it was given back on, whose order, into which `wait`
has put the messages, keeps the next use behind the last one. A graph under capture neither takes
from the pool nor gives to it: its buffers are the graph's.
"""

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
    stream: int | None = None  # see stream_of


def stream_of(device: torch.device) -> int | None:
    """What a buffer's uses are ordered by: the current stream, 0 on the CPU, None in a capture."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return int(torch.cuda.current_stream(device).cuda_stream)


class BufferPool:
    """Flat buffers of one group. A buffer on loan is never shared; a lost lease is simply freed.

    A communication that failed may still write into its buffers, so an error path never gives
    back: the garbage collector frees them when the backend lets go.
    """

    def __init__(self) -> None:
        self._idle: list[tuple[int, Tensor]] = []  # with their streams
        self._lock = threading.Lock()

    def lease(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Lease:
        """A flat uninitialised buffer of `numel` elements on `like`'s device."""
        dtype = dtype or like.dtype
        nbytes = numel * dtype.itemsize
        stream = stream_of(like.device)
        with self._lock:
            # Best fit, but never more than twice the need: the pool must not hoard large buffers.
            fits = [
                raw
                for idle_on, raw in self._idle
                if raw.device == like.device
                and idle_on == stream
                and nbytes <= raw.numel() <= 2 * nbytes
            ]
            raw = min(fits, key=Tensor.numel) if fits else None
            if raw is not None:
                self._idle = [idle for idle in self._idle if idle[1] is not raw]
        if raw is None:
            raw = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return Lease(raw[:nbytes].view(dtype), raw, stream)

    def give_back(self, lease: Lease) -> None:
        """Returns a buffer whose messages are complete, in the order of the current stream."""
        stream = stream_of(lease.raw.device)
        if stream is None or stream != lease.stream:
            if lease.raw.device.type == "cuda":  # freed, but not before this stream is done with it
                lease.raw.record_stream(torch.cuda.current_stream(lease.raw.device))
            return
        with self._lock:
            self._idle = [*self._idle, (stream, lease.raw)][-_IDLE_BUFFERS:]

    @property
    def idle_bytes(self) -> int:
        """Bytes held for reuse."""
        with self._lock:
            return sum(raw.numel() for _, raw in self._idle)
