# SPDX-License-Identifier: BSD-3-Clause
"""What the host knows and kernels read on a device: copied once, without a wait on the host.

Note [captures]. While a CUDA graph is captured nothing may be copied from the host, and no event
recorded before may be asked or waited for. So whatever plans and layouts have on a device is made
by a first call outside: the warm-up that graphs ask for anyway. It has arrived by then, as
torch.cuda.graph begins with torch.cuda.synchronize(). A graph reads it at every replay: what one
has read is never dropped while the plan lives, so keep the plan as long as the graph. Positions of
layouts that one has read are kept as long as the process.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class DeviceCopy:
    """A host tensor's copy on a device, for all streams of it.

    On CUDA the copy is made from pinned memory on the stream that is current then; other streams
    wait for it on the device.

    Raises:
        RuntimeError: the current stream is being captured, see Note [captures].

    Attributes:
        captured: whether a CUDA graph reads it.
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.captured = False
        self._arrived: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensor = host.to(device)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "ring_attention: expected a call that is captured in a CUDA graph to have run "
                f"before with this plan and layout on {device}, got its first (or what it reads "
                "was dropped: plans keep 64 MB of masks, layers the positions of 16 layouts); "
                "run it once before the capture"
            )
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
        if torch.cuda.is_current_stream_capturing():
            self.captured = True
            return self._tensor
        current = torch.cuda.current_stream(self._tensor.device)
        if current == self._stream:
            return self._tensor
        if self._arrived is not None and self._arrived.query():
            self._arrived = None
        if self._arrived is not None:
            current.wait_event(self._arrived)
        # The allocator hands memory on in the order of the stream it was allocated on alone.
        self._tensor.record_stream(current)
        return self._tensor


class DeviceCopies:
    """Copies by key and device, least recently used first out; what a CUDA graph reads stays.

    It stays as long as this does, and is not counted.

    Args:
        most: copies that are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.kept: OrderedDict[tuple[Hashable, torch.device], DeviceCopy] = OrderedDict()

    @torch.compiler.disable
    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The copy of what `make` makes on the host, to be read on the current stream."""
        with self.lock:
            place = key, device
            if place not in self.kept:
                self.kept[place] = DeviceCopy(make(), device)
                droppable = [old for old, copy in self.kept.items() if not copy.captured]
                for old in droppable[: -self.most]:
                    del self.kept[old]
            self.kept.move_to_end(place)
            return self.kept[place].get()
