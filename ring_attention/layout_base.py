# SPDX-License-Identifier: BSD-3-Clause
"""What a layout is: who holds which positions of a sequence. The layouts themselves: layout.py.

Note [layouts]. A layout maps every global position to one (rank, local index), for any length and
any world size: shards may be uneven or empty, and nothing is padded. Local order is ascending in
position, which is what lets an interval of positions be an interval of rows of every shard. A shard
is a few strided runs (start, block, stride, count).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _planner
from .device_copy import DeviceCopies
from .mask_algebra import at_least, refuse

Run = tuple[int, int, int, int]  # (start, block, stride, count)


@dataclass(frozen=True)
class Layout:
    """Base of all layouts: subclasses say how ``runs`` cut the sequence.

    Args:
        length: positions of the whole sequence, >= 0.
        world_size: ranks, >= 1.
    """

    length: int
    world_size: int
    kinds: ClassVar[dict[str, Callable[..., Layout]]] = {}

    def __init_subclass__(cls) -> None:
        Layout.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        name = type(self).__name__
        at_least(name, "length", self.length, 0, "it counts the positions of the whole sequence")
        at_least(name, "world_size", self.world_size, 1, "it counts the ranks of the group")

    def runs(self, rank: int) -> list[Run]:
        """The runs of a rank, ascending; runs of no rows are allowed."""
        raise NotImplementedError

    @property
    def table(self) -> _planner.Layout:
        """The layout as the planner takes it."""
        return _table(self)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows per rank."""
        return tuple(self.table.size(rank) for rank in range(self.world_size))

    def positions(self, rank: int) -> Tensor:
        """The global positions of a rank's rows: int64 [sizes[rank]], ascending.

        Example:
            >>> Zigzag(8, 2).positions(0).tolist()
            [0, 1, 6, 7]
        """
        parts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        for start, block, stride, count in self.runs(self.rank_of(rank)):
            first = torch.arange(count, device="cpu")[:, None] * stride + start
            parts.append((first + torch.arange(block, device="cpu")).flatten())
        return torch.cat(parts)

    def positions_on(self, rank: int, device: torch.device) -> Tensor:
        """``positions`` on a device. A copy to a GPU is made once: layers ask in every call."""
        if device.type == "cpu":
            return self.positions(rank)
        return _positions.get((self, rank), device, lambda: self.positions(rank))

    def order_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The positions of every rank on a device: as ``positions_on``, in one copy."""
        ranks = range(self.world_size)
        if device.type == "cpu":
            return tuple(map(self.positions, ranks))
        order = _positions.get(self, device, lambda: torch.cat([*map(self.positions, ranks)]))
        return order.split(self.sizes)

    def shard(self, x: Any, rank: Any, dim: int = 1) -> Any:
        """This rank's rows of whole tensors.

        Args:
            x: a tensor whose dimension ``dim`` is the whole sequence, or a dict of such tensors.
            rank: a rank, or the group in which to look it up.
            dim: the sequence dimension.

        Raises:
            ValueError: a tensor is not as long as the layout, or the group has another size.

        Example:
            >>> Striped(5, 2).shard(torch.arange(5)[None], 1).tolist()
            [[1, 3]]
        """
        rank = self.rank_of(rank)
        if isinstance(x, dict):
            return {name: self._shard(name, value, rank, dim) for name, value in x.items()}
        return self._shard("x", x, rank, dim)

    def unshard(self, x: Tensor, group: Any, dim: int = 1) -> Tensor:
        """The whole tensor from every rank's shard: a collective, differentiable, exact.

        Every rank gets the whole tensor, and its shard gets the sum of the gradients that all ranks
        have for it: the convention of torch.distributed's differentiable all_gather. If every rank
        computes the same loss from the result, divide that loss by the world size.

        Args:
            x: this rank's shard, ``sizes[rank]`` along ``dim``; the other dimensions are the same
                on all ranks.
            group: the group that holds the shards (None: world size 1).
            dim: the sequence dimension.
        """
        rank = self.rank_of(group)
        self._check("unshard", "x", x, dim, self.sizes[rank])
        out: Tensor = _Unshard.apply(x, self, group, rank, dim)
        return out

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form; ``Layout.from_dict`` is its inverse."""
        names = [field.name for field in dataclasses.fields(self) if field.init]
        return {"layout": type(self).__name__} | {name: getattr(self, name) for name in names}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Layout:
        """The layout that ``to_dict`` described."""
        kind = Layout.kinds.get(data.get("layout", ""))
        if kind is None:
            refuse("Layout.from_dict", f"a layout of {sorted(Layout.kinds)}", data, "use to_dict")
        return kind(**{name: value for name, value in data.items() if name != "layout"})

    def rank_of(self, rank: Any) -> int:
        """A rank as it is, or this process's rank in a group; both checked against the layout."""
        name = type(self).__name__
        if isinstance(rank, int):
            if not 0 <= rank < self.world_size:
                refuse(name, f"a rank in [0, {self.world_size})", rank, "pass a rank or its group")
            return rank
        from . import groups

        size = groups.size_of(rank)
        if size != self.world_size:
            remedy = "make the layout for this group, or pass the group it was made for"
            refuse(name, f"a group of {self.world_size} ranks", size, remedy)
        return groups.rank_of(rank)

    def _check(self, method: str, name: str, x: Tensor, dim: int, rows: int) -> None:
        where = f"{type(self).__name__}.{method}"
        if not isinstance(x, Tensor):
            refuse(where, f"a tensor as {name}", type(x).__name__, "leave other values out")
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != rows:
            remedy = f"dim={dim} must be the sequence"
            refuse(where, f"{name}.shape[{dim}] == {rows}", f"shape {tuple(x.shape)}", remedy)

    def _shard(self, name: str, x: Tensor, rank: int, dim: int) -> Tensor:
        self._check("shard", name, x, dim, self.length)
        runs = [run for run in self.runs(rank) if run[1] * run[3] > 0]
        if runs and all(count == 1 for *_, count in runs):  # chunks: slices copy faster than rows
            return torch.cat([x.narrow(dim, start, block) for start, block, *_ in runs], dim)
        return x.index_select(dim, self.positions_on(rank, x.device))


_positions = DeviceCopies(most=16)


@lru_cache(maxsize=64)
def _table(layout: Layout) -> _planner.Layout:
    runs = [layout.runs(rank) for rank in range(layout.world_size)]
    return _planner.Layout(layout.length, runs)


class _Unshard(torch.autograd.Function):  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: Any, rank: int, dim: int) -> Tensor:
        from . import groups

        ctx.layout, ctx.group, ctx.rank, ctx.dim = layout, group, rank, dim
        parts = [x] if layout.world_size == 1 else groups.all_gather(x.detach(), group)
        shape = list(x.shape)
        shape[dim] = layout.length
        out = x.new_empty(shape)
        for where, part in zip(layout.order_on(x.device), parts, strict=True):
            out.index_copy_(dim, where, part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        from . import groups

        if ctx.layout.world_size > 1:
            grad = grad.contiguous().clone()
            groups.all_reduce_(grad, ctx.group)
        return ctx.layout.shard(grad, ctx.rank, ctx.dim), None, None, None, None
