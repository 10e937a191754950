# SPDX-License-Identifier: BSD-3-Clause
"""dK/dV by tile on their way home; Note [invariant]."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .messages import Messages, Rows, Sums
from .ring import Transport
from .steps import Step, Transfer
from .tiles import Tiles
from .tree import Trees


class TileSums(Sums):
    """dK/dV on their way home, by tile: a message has the nodes of trees that a rank could join."""

    def __init__(
        self,
        transport: Transport,
        tiles: Tiles,
        own: Rows,
        trees: Trees,
        write: Callable[[int], None],
    ) -> None:
        super().__init__(transport, "dK/dV", own)
        self._tiles = tiles
        self._trees = trees
        self._write = write

    def exchange(self, messages: Messages, step: Step) -> None:
        for transfer in step.grad_sends:
            message = self.own.in_buffer(self._transport.pool, transfer.num_rows)
            for j, node, parts in self._parts(message, self._transport.rank, transfer):
                value = self._trees[j].pending.pop(node)
                for part, x in zip(parts, value, strict=True):
                    part.copy_(x)
                self._trees.give_back(value)
            messages.send(message, transfer, self._kind, last=True)
        for transfer in step.grad_recvs:
            self._in.append((transfer, messages.receive(self.own, transfer, self._kind)))

    def add_arrived(self, following: int, held_rows: dict[int, int]) -> None:
        for transfer, message in self._arrived(following):
            for j, node, parts in self._parts(message, transfer.peer, transfer):
                value = self._trees.buffer()
                for part, x in zip(parts, value, strict=True):
                    x.copy_(part)
                self._trees[j].add_node(node, value)
                self._write(j)
            assert message.lease is not None
            self._transport.pool.give_back(message.lease)

    def _parts(
        self, message: Rows, sender: int, transfer: Transfer
    ) -> list[tuple[int, int, list[Tensor]]]:
        """Key tile, node and rows of what is in a message."""
        rows = self._tiles.k_rows
        return [
            (j, node, [x[:, :, n * rows : (n + 1) * rows] for x in message.tensors])
            for n, (j, node) in enumerate(self._tiles.going_home(sender, transfer.origin))
        ]
