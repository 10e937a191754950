# SPDX-License-Identifier: BSD-3-Clause
"""What the host knows and kernels read on a device: copied once, without a wait on the host."""

import torch
from torch import Tensor


class DeviceCopy:
    """A host tensor's copy on a device, for all streams of it.

    On CUDA the copy is made from pinned memory on the stream that is current then; other streams
    wait for it on the device.
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self._arrived: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensor = host.to(device)
            return
        self._stream = torch.cuda.current_stream(device)
        self._tensor = host.pin_memory().to(device, non_blocking=True)
        self._arrived = self._stream.record_event()

    @property
    def nbytes(self) -> int:
        return self._tensor.untyped_storage().nbytes()

    def get(self) -> Tensor:
        """The copy, to be read on the current stream."""
        if self._tensor.device.type != "cuda":
            return self._tensor
        current = torch.cuda.current_stream(self._tensor.device)
        if current == self._stream:
            return self._tensor
        # Asked until the copy has arrived, and then never again: a captured graph may not wait for
        # what was recorded outside of it.
        if self._arrived is not None and self._arrived.query():
            self._arrived = None
        if self._arrived is not None:
            current.wait_event(self._arrived)
        # The allocator hands memory on in the order of the stream it was allocated on alone.
        self._tensor.record_stream(current)
        return self._tensor
