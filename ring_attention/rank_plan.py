# SPDX-License-Identifier: BSD-3-Clause
"""The plan of one rank: what it folds, sends and receives, and which keys its queries see."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _planner
from .interval_cache import IntervalCache, clipped, key_intervals
from .layout import Layout
from .mask_algebra import Mask, refuse
from .registry import register
from .steps import Step, last_due

if TYPE_CHECKING:
    from .prediction import Prediction
    from .tiles import Tiles

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """One rank's part of a distributed attention call; made by ``plan``.

    Attributes:
        rank, world_size: whose plan, of how many.
        mask, q_layout, k_layout, generator, resident, ranks_per_node, ulysses: what it was made
            from.
        traveller: what goes around in the forward and in the backward: "kv" or "q". The steps of
            "q" say queries where Step says K/V, and a state or dQ where it says dK/dV.
        steps: what to do; at least one. With ulysses > 1 they are those of `ring`.
        backward_steps: what to do in the backward; the same, if the same travels.
        ring: with ulysses > 1, the plan of this rank's ring of world_size / ulysses ranks, over the
            merged layouts and for its share of the heads; None without.
        tiles: with ``invariant``, what the sequence is cut into, and blocks and gradients travel
            in, see Note [invariant] in tiles.py; None without.
        prediction: what the schedule takes on the machine it was chosen for, if any.
        digest: 63 bits that are equal on all ranks, processes and machines for equal arguments.
    """

    rank: int
    world_size: int
    mask: Mask
    q_layout: Layout
    k_layout: Layout
    generator: str
    resident: int
    ranks_per_node: int
    steps: tuple[Step, ...] = field(repr=False, compare=False)
    digest: int = field(repr=False)
    backward_steps: tuple[Step, ...] = field(repr=False, compare=False)
    _reads: _planner.Reads = field(repr=False, compare=False)
    traveller: tuple[str, str] = ("kv", "kv")
    ulysses: int = 1
    ring: Plan | None = field(default=None, repr=False, compare=False)
    tiles: Tiles | None = field(default=None, repr=False)
    prediction: Prediction | None = field(default=None, repr=False, compare=False)
    _cache: IntervalCache = field(default_factory=IntervalCache, repr=False, compare=False)
    _query_cache: IntervalCache = field(default_factory=IntervalCache, repr=False, compare=False)
    _splits: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    def intervals(
        self,
        origin: int,
        device: torch.device = _CPU,
        keys: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the own query rows see of a block that this rank folds.

        Rows count from the block as held (see Step), so kernels can take them as they are. Kept for
        the next call, up to INTERVAL_CACHE_BYTES per plan.

        Args:
            origin: whose block.
            device: where the intervals are wanted; moved there once, without a wait on the host.
            keys: only these keys of the block, [begin, end).

        Returns:
            key_begin, key_end: int32 [n, B or 1, q_len], ``begin >= end`` for a row that sees
            nothing; expanded (stride 0) if all rows are alike.
        """
        if self.ring is not None:
            return self.ring.intervals(origin, device, keys)
        key = origin, device, keys
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        if origin not in self._held:
            refuse("Plan.intervals", f"an origin of {sorted(self._held)}", origin, "see Plan.steps")
        both = key_intervals(self._reads, self.rank, origin, self._held[origin])
        return self._cache.put(key, clipped(both, keys), self.q_layout.sizes[self.rank])

    def query_intervals(
        self,
        origin: int,
        device: torch.device = _CPU,
        keys: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the queries of a travelling block see of the own keys.

        Args:
            origin, device, keys: as in `intervals`; the block is one of queries.

        Returns:
            key_begin, key_end: int32 [n, B or 1, rows of the block as held], as in `intervals`.
        """
        if self.ring is not None:
            return self.ring.query_intervals(origin, device, keys)
        key = origin, device, keys
        cached = self._query_cache.get(key)
        if cached is not None:
            return cached
        held = self._held_queries[origin]
        whole = _planner.Ranges([(0, self.k_layout.sizes[self.rank])])
        both = key_intervals(self._reads, origin, self.rank, whole)
        if held.rows < both.shape[3]:
            index = torch.empty(held.rows, dtype=torch.int64, device="cpu")
            held.fill(index.data_ptr())
            both = both.index_select(3, index)
        return self._query_cache.put(key, clipped(both, keys), held.rows)

    def places(self, origin: int) -> dict[int, int]:
        """With tiles: where the key tiles of a block as held begin, by tile."""
        assert self.tiles is not None
        return self.tiles.places(origin, self._held[origin])

    def own_split(
        self, kv_itemsize: int, grad_itemsize: int, steps: Sequence[Step] | None = None
    ) -> int:
        """How many rows of the own key block the backward folds first; the others come last.

        The first part hides the first K/V hop, the last part the last gradient hop: they share the
        block's flops as those hops share the bytes.

        Args:
            kv_itemsize, grad_itemsize: bytes per element of K/V and of dK/dV on their way, or per
                row of what travels and of what goes home.
            steps: those with the hops; None: of the backward.
        """
        if self.ring is not None:
            return self.ring.own_split(kv_itemsize, grad_itemsize, steps)
        steps = self.backward_steps if steps is None else steps
        first, last = steps[0], steps[-1]
        kv = kv_itemsize * max(first.rows, sum(t.num_rows for t in first.recvs))
        grad = grad_itemsize * max(last.grad_rows, sum(t.num_rows for t in last.grad_recvs))
        if grad == 0:  # nothing to hide at the end
            return self.k_layout.sizes[self.rank]
        split = self._splits.get((kv, grad))
        if split is None:
            begin, end = self.intervals(self.rank)

            def done(rows: int) -> int:  # pairs of the first rows, times the bytes of both hops
                below = end.clamp(max=rows) - begin.clamp(max=rows)
                return (kv + grad) * int(below.sum(dtype=torch.int64))

            rows = self.k_layout.sizes[self.rank]
            wanted = kv * done(rows) // (kv + grad)
            split = bisect_left(range(rows), wanted, key=done)
            if self.tiles is not None:
                split = self.tiles.whole(split)
            self._splits[kv, grad] = split
        return split

    @cached_property
    def handle(self) -> Tensor:
        """An int64 CPU tensor that stands for this plan in compiled graphs; see registry.py."""
        return register(self)

    @cached_property
    def _held(self) -> dict[int, _planner.Ranges]:
        return self._blocks("kv", self.k_layout)

    @cached_property
    def _held_queries(self) -> dict[int, _planner.Ranges]:
        return self._blocks("q", self.q_layout)

    def _blocks(self, traveller: str, layout: Layout) -> dict[int, _planner.Ranges]:
        """The rows of every block that this rank holds at some time."""
        both = zip(self.traveller, (self.steps, self.backward_steps), strict=True)
        steps = next((steps for what, steps in both if what == traveller), ())
        own = _planner.Ranges([(0, layout.sizes[self.rank])])
        return {self.rank: own} | {t.origin: t.ranges for s in steps for t in s.recvs}

    @cached_property
    def held_rows(self) -> dict[int, int]:
        """How many rows of every block of K/V this rank holds at some time, by origin."""
        return {origin: ranges.rows for origin, ranges in self._held.items()}

    @cached_property
    def held_query_rows(self) -> dict[int, int]:
        """As held_rows, of queries that travel."""
        return {origin: ranges.rows for origin, ranges in self._held_queries.items()}

    @cached_property
    def last_due(self) -> int:
        """The hop after which nothing is under way any more."""
        return last_due(self.backward_steps)

    @property
    def flops(self) -> tuple[int, ...]:
        """Visible query-key pairs per step and head."""
        return tuple(step.flops for step in self.steps)

    @property
    def rows(self) -> tuple[int, ...]:
        """K/V rows sent per step."""
        return tuple(step.rows for step in self.steps)

    def positions(self) -> Tensor:
        """The global positions of this rank's queries: int64 [q_len]."""
        return self.q_layout.positions(self.rank)

    def shard(self, x: Any, dim: int = 1) -> Any:
        """This rank's rows of a whole tensor, or of a dict of them, as the queries are laid out."""
        return self.q_layout.shard(x, self.rank, dim)

    def unshard(self, x: Tensor, group: Any, dim: int = 1) -> Tensor:
        """The whole tensor from all ranks' rows; see Layout.unshard."""
        return self.q_layout.unshard(x, group, dim)

    def explain(self) -> str:
        """The plan in words; with shapes and machine, what it is predicted to take."""
        return repr(self) if self.prediction is None else self.prediction.explain()

    def draw(self, path: Any) -> None:
        """Draws the predicted timeline, ranks x time: .png, .svg or .pdf; needs matplotlib."""
        if self.prediction is None:
            remedy = "make the plan with shapes= and machine="
            refuse("Plan.draw", "a plan with a prediction", "none", remedy)
        self.prediction.draw(path)

    def __repr__(self) -> str:
        layout = repr(self.q_layout)
        if self.k_layout != self.q_layout:
            layout += f" over {self.k_layout!r}"
        how = self.generator
        if self.ranks_per_node > 1:
            how += f" in nodes of {self.ranks_per_node}"
        if self.resident > 1:
            how += f", {self.resident} resident"
        if self.ulysses > 1:
            how += f", heads over {self.ulysses}"
        if "q" in self.traveller:
            how += f", {'/'.join(self.traveller)} travel"
        if self.tiles is not None:
            how += f", invariant over {self.tiles.count} tiles"
        return (
            f"Plan({self.mask!r} on {layout}, {how}, rank {self.rank} of "
            f"{self.world_size}: {len(self.steps)} steps, {sum(self.flops)} pairs, "
            f"{sum(self.rows)} rows sent)"
        )
