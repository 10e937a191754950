# SPDX-License-Identifier: BSD-3-Clause
"""Some ranks of a group as a ring of their own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ring import Message, Pending, Transport


class Subring(Transport):
    """Some ranks of a group as a ring, over the group's own messages.

    Args:
        parent: the group; this rank is one of the members.
        members: its ranks, in ring order.
    """

    def __init__(self, parent: Transport, members: Sequence[int]) -> None:
        super().__init__()
        self._parent = parent
        self._members = list(members)
        self.pool = parent.pool
        self.rank = self._members.index(parent.rank)
        self.size = len(self._members)
        self.name = f"{parent.name}/{self._members}"

    @property
    def ring(self) -> str:
        return f"{self._parent.ring}/{self._members}"

    @property
    def place(self) -> str:
        return self._parent.place

    @property
    def store(self) -> Any:
        return dist.PrefixStore(str(self._members), self._parent.store)

    def post(self, messages: Sequence[Message]) -> Pending:
        return self._parent.post(
            [replace(message, peer=self._members[message.peer]) for message in messages]
        )

    def gather_equal(self, x: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(x) for _ in self._members]
        gathered[self.rank].copy_(x)
        others = [peer for peer in range(self.size) if peer != self.rank]
        sends = [Message(x, peer, "heads", 0, sending=True) for peer in others]
        receives = [Message(gathered[peer], peer, "heads", 0, sending=False) for peer in others]
        self.post([*sends, *receives]).wait()
        return gathered

    def sum_(self, x: Tensor) -> None:
        x.copy_(torch.stack(self.gather_equal(x.clone())).sum(0))
