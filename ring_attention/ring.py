# SPDX-License-Identifier: BSD-3-Clause
"""The transport: post and wait over a process group."""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import priority
from .buffers import BufferPool


class RingError(RuntimeError):
    """Ranks that disagree, that never arrived, or a message that failed."""


def timeout_s() -> float:
    """Seconds a rank waits for another: RING_ATTENTION_TIMEOUT, 600 when unset."""
    value = os.environ.get("RING_ATTENTION_TIMEOUT", "600")
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ValueError(
            "ring_attention: expected RING_ATTENTION_TIMEOUT to be a positive number of seconds, "
            f"got {value!r}; unset it for the default of 600"
        )
    return seconds


# What messages carry; gloo matches a kind by its tag, NCCL by order, the same on both sides.
TRAVELLERS = ("K/V", "Q")
KINDS = (*TRAVELLERS, "dK/dV", "dQ", "state", "heads")


@dataclass(frozen=True, eq=False)
class Message:
    """One message of a step: `flat` goes to, or arrives from, group rank `peer`."""

    flat: Tensor
    peer: int
    kind: str  # one of KINDS
    step: int
    sending: bool
    pack: Callable[[], None] | None = None  # writes flat, once, before it is sent

    def __str__(self) -> str:
        what = f"sending {self.kind} to" if self.sending else f"receiving {self.kind} from"
        return f"{what} group rank {self.peer} in step {self.step}, {self.nbytes} bytes"

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def pack(messages: Iterable[Message]) -> None:
    """Writes what the messages carry, where that is not done yet."""
    for message in messages:
        if message.pack is not None:
            message.pack()


class Pending(ABC):
    """Messages under way."""

    @abstractmethod
    def wait(self) -> None:
        """Returns when every message is complete; raises RingError naming the one that failed."""


@dataclass
class CallBook:
    """What a rank remembers of a group between calls, for the agreement between its ranks."""

    calls: int = 0
    poison: str | None = None
    warm: set[torch.device] = field(default_factory=set)  # devices whose communicator is up
    agreed: dict[int, dict[str, str]] = field(default_factory=dict)  # plan digest -> fields


class Transport(ABC):
    """One rank's end of a ring."""

    name: str  # unique in this process while the group lives
    rank: int
    size: int

    def __init__(self) -> None:
        self.pool = BufferPool()
        self.book = CallBook()
        self.rings: dict[int, Transport] = {}  # Ulysses degree -> this rank's part of the group

    @property
    def ring(self) -> str:
        """The group's name in traces: the same on all its ranks."""
        return self.name

    @property
    def place(self) -> str:
        """Which of a job's processes or virtual ranks this is, for traces."""
        return f"rank{dist.get_rank()}" if dist.is_initialized() else f"rank{self.rank}"

    @property
    @abstractmethod
    def store(self) -> Any:
        """The key-value store that all ranks of the group share (torch.distributed.Store)."""

    @abstractmethod
    def post(self, messages: Sequence[Message]) -> Pending:
        """Packs and posts all messages of a step; an empty step is complete."""

    @abstractmethod
    def gather_equal(self, x: Tensor) -> list[Tensor]:
        """One tensor per rank, all of x's shape and dtype."""

    @abstractmethod
    def sum_(self, x: Tensor) -> None:
        """Sums x over the ranks in place."""

    def warm_up(self, device: torch.device) -> None:
        """Collective, once per device: NCCL's first call on a group must include all its ranks.

        A hop's messages may be of some ranks only.
        """
        if device.type != "cpu" and device not in self.book.warm:
            self.sum_(torch.zeros(1, device=device))
            self.book.warm.add(device)


class _Works(Pending):
    def __init__(self, messages: Sequence[Message], works: Sequence[Any], group: str) -> None:
        # Keeping the messages keeps their buffers alive until the backend is done with them.
        self._messages = messages
        self._works = works
        self._group = group

    def wait(self) -> None:
        on_host = all(message.flat.device.type == "cpu" for message in self._messages)
        coalesced = len(self._works) != len(self._messages)
        for i, work in enumerate(self._works):
            try:
                # A time-out argument would make NCCL block the host; its watchdog has its own.
                done = work.wait(timedelta(seconds=timeout_s())) if on_host else work.wait()
            except RuntimeError as error:
                failed = self._messages if coalesced else [self._messages[i]]
                what = "; or ".join(str(message) for message in failed)
                raise RingError(
                    f"ring_attention: {what}, failed on group {self._group!r}: {error}. The group "
                    "cannot be used any more; look at that rank's own error first"
                ) from error
            if done is False:
                raise RingError(f"ring_attention: {self._messages[i]} was aborted")


class _Complete(Pending):
    def wait(self) -> None:
        return None


class LocalTransport(Transport):
    """This process alone: a ring of one, which never communicates."""

    name = "local"
    rank = 0
    size = 1

    @property
    def store(self) -> Any:
        return dist.HashStore()

    def post(self, messages: Sequence[Message]) -> Pending:
        assert not messages
        return _Complete()

    def gather_equal(self, x: Tensor) -> list[Tensor]:
        return [x]

    def sum_(self, x: Tensor) -> None:
        return None


class ProcessGroupTransport(Transport):
    """A rank of a torch.distributed process group: gloo on CPU, NCCL on GPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = weakref.ref(group)
        self.name = group.group_name
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                "ring_attention: expected group to contain this rank, got a group without it; "
                "pass each rank the group it belongs to"
            )

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RingError(f"ring_attention: process group {self.name!r} has been destroyed")
        return group

    @property
    def store(self) -> Any:
        return self.group.get_group_store()

    def post(self, messages: Sequence[Message]) -> Pending:
        if not messages:  # an empty batch raises
            return _Complete()
        if messages[0].flat.device.type == "cpu":
            return self._post_singly(messages)
        pack(messages)
        operations = [
            dist.P2POp(
                dist.isend if message.sending else dist.irecv,
                message.flat,
                group=self.group,
                group_peer=message.peer,
                tag=1 + KINDS.index(message.kind),
            )
            for message in messages
        ]
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            what = "; ".join(str(message) for message in messages)
            raise RingError(f"ring_attention: posting failed: {what}: {error}") from error
        return _Works(messages, works, self.name)

    def _post_singly(self, messages: Sequence[Message]) -> Pending:
        """As a backend without batches posts one, receives first.

        gloo sends once the peer has said that it receives, and says so in the stream that carries
        its own message: behind it, if that was posted first, and the two directions of a link would
        take turns. What has to be packed is packed in between, while messages of the peer arrive:
        when this thread is in the middle of writing one, gloo's cannot take them, and spins.
        """
        group, works = self.group, []
        messages = sorted(messages, key=lambda message: message.sending)
        for message in messages:
            tag = 1 + KINDS.index(message.kind)
            pack([message])
            try:
                if message.sending:
                    work = dist.isend(message.flat, group=group, group_dst=message.peer, tag=tag)
                else:
                    work = dist.irecv(message.flat, group=group, group_src=message.peer, tag=tag)
            except RuntimeError as error:
                raise RingError(f"ring_attention: posting failed: {message}: {error}") from error
            works.append(work)
        return _Works(messages, works, self.name)

    def warm_up(self, device: torch.device) -> None:
        if device.type == "cuda" and device not in self.book.warm:
            priority.advise(self.group, device)
        super().warm_up(device)

    def gather_equal(self, x: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x, group=self.group)
        return gathered

    def sum_(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)
