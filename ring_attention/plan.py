# SPDX-License-Identifier: BSD-3-Clause
"""Plans: what one rank of the ring folds, sends and receives, step by step.

Note [plan]. ``plan(mask, layout, rank=r)`` is pure and local: the same arguments give matching
plans on all ranks, without a word between them. Blocks travel compact: only rows that some query of
the receiver (or of a rank it forwards to) sees are sent, and steps nobody needs do not exist. The
ring loop runs any plan; how steps come about is up to a generator in csrc/plan/schedule.cpp.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _planner
from .interval_cache import IntervalCache, clipped
from .layout import Layout
from .mask_algebra import Mask, at_least, refuse
from .merged import Merged
from .registry import register
from .ring import degrees_of
from .steps import Step, last_due, step_of

if TYPE_CHECKING:
    from .costs import Shapes
    from .figures import Machine
    from .predict import Prediction

GENERATORS: tuple[str, ...] = _planner.GENERATORS
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
        both = self._intervals(self.rank, origin, self._held[origin])
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
        both = self._intervals(origin, self.rank, whole)
        if held.rows < both.shape[3]:
            index = torch.empty(held.rows, dtype=torch.int64)
            held.fill(index.data_ptr())
            both = both.index_select(3, index)
        return self._query_cache.put(key, clipped(both, keys), held.rows)

    def _intervals(self, reader: int, origin: int, held: _planner.Ranges) -> Tensor:
        """What all queries of a rank see of the rows held of a block of keys.

        Returns:
            begins and ends, int32 [2, n, B or 1, q_len], or [..., 1] if all rows are alike.
        """
        view = self._reads.key_intervals(reader, origin, held)
        both = torch.empty(2, view.most, self._samples, view.rows, dtype=torch.int32)
        used = view.fill(both[0].data_ptr(), both[1].data_ptr())
        return both[:, :used].clone() if used < view.most else both

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
            self._splits[kv, grad] = split
        return split

    @cached_property
    def handle(self) -> Tensor:
        """An int64 CPU tensor that stands for this plan in compiled graphs; see registry.py."""
        return register(self)

    @cached_property
    def _samples(self) -> int:
        return self._reads.samples

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
        return (
            f"Plan({self.mask!r} on {layout}, {how}, rank {self.rank} of "
            f"{self.world_size}: {len(self.steps)} steps, {sum(self.flops)} pairs, "
            f"{sum(self.rows)} rows sent)"
        )


def _digest(mask: Mask, q_layout: Layout, k_layout: Layout, *how: str | int) -> int:
    parts = [mask.to_dict(), q_layout.to_dict(), k_layout.to_dict(), *how]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _schedule(
    world_size: int, generator: str, resident: int, ranks_per_node: int | None
) -> tuple[str, int]:
    """The generator and the ranks per node that were asked for, once they fit together."""
    if generator not in ("auto", *GENERATORS):
        refuse(
            "plan", f"a generator of {('auto', *GENERATORS)}", repr(generator), "pass one of them"
        )
    at_least("plan", "resident", resident, 1, "it counts travelling blocks")
    if generator == "auto":
        generator = "direct" if ranks_per_node is None else "double"
    if generator != "double":
        if ranks_per_node is not None:
            remedy = 'leave it out, or pass generator="double"'
            refuse("plan", f"no ranks_per_node with {generator}", ranks_per_node, remedy)
        if generator != "direct" and resident > 1:
            refuse(
                "plan", f"resident == 1 with {generator}", resident, 'generator="direct" has more'
            )
        return generator, 1
    if resident > 1:
        refuse("plan", "resident == 1 with double", resident, 'generator="direct" has more')
    fits = [n for n in range(2, world_size + 1) if world_size % n == 0]
    if ranks_per_node not in fits:
        remedy = 'pass generator="direct" for a ring without nodes'
        refuse("plan", f"ranks_per_node of {fits} with double", ranks_per_node, remedy)
    assert ranks_per_node is not None
    return generator, ranks_per_node


def _nodes_of_ring(world_size: int, ranks_per_node: int | None, ulysses: int) -> int | None:
    """The ranks per node of a ring under Ulysses; None if there is one ring rank in each."""
    fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
    if ulysses not in fits:
        refuse("plan", f"ulysses of {fits}", ulysses, f"it splits {world_size} ranks")
    if ranks_per_node is None:
        return None
    if ranks_per_node % ulysses:
        remedy = "a Ulysses group does not cross nodes"
        refuse("plan", f"ulysses to divide ranks_per_node = {ranks_per_node}", ulysses, remedy)
    return None if ulysses in (ranks_per_node, world_size) else ranks_per_node // ulysses


def _travellers(
    traveller: str | tuple[str, str],
    like: tuple[Tensor, Tensor, Tensor] | None,
    q_layout: Layout,
    k_layout: Layout,
    generator: str,
) -> tuple[str, str]:
    """What travels in the forward and in the backward."""
    if traveller == "auto":
        if like is None:
            refuse("plan", 'like with traveller="auto"', None, "pass like=(q, k, v)")
        return _cheapest(*like, q_layout, k_layout) if generator == "direct" else ("kv", "kv")
    both = (traveller, traveller) if isinstance(traveller, str) else tuple(traveller)
    if len(both) != 2 or not set(both) <= {"kv", "q"}:
        expected = 'a traveller of "kv", "q", "auto" or a pair of "kv" and "q"'
        refuse("plan", expected, repr(traveller), "the pair is for forward and backward")
    if "q" in both and generator != "direct":
        refuse("plan", f'traveller "kv" with {generator}', repr(traveller), 'q needs "direct"')
    return both[0], both[1]


def _cheapest(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
) -> tuple[str, str]:
    """By bytes sent if every rank needs every row: what goes out, and what comes home in fp32."""
    (_, heads, _, head_dim), (_, kv_heads, _, v_head_dim) = q.shape, v.shape
    element, wide = q.element_size(), 8 if q.dtype == torch.float64 else 4
    queries, keys = q_layout.length * heads, k_layout.length * kv_heads
    both = head_dim + v_head_dim
    forward = queries * (head_dim * element + (v_head_dim + 2) * wide) < keys * both * element
    backward = queries * (both * element + 2 * wide + head_dim * wide) < keys * both * (
        element + wide
    )
    return "q" if forward else "kv", "q" if backward else "kv"


def _predicted(
    mask: Mask,
    layout: Layout,
    rank: int,
    generator: str,
    resident: int,
    ranks_per_node: int | None,
    shapes: Shapes,
    machine: Machine,
    memory_bytes: float | None,
) -> Plan:
    """The plan that a prediction chose, or predicted as it was chosen by name."""
    from .predict import predict

    if ranks_per_node not in (None, machine.ranks_per_node):
        remedy = "leave it out: the machine says it"
        refuse("plan", f"ranks_per_node == {machine.ranks_per_node}", ranks_per_node, remedy)
    prediction = predict(
        mask,
        layout,
        shapes,
        machine,
        generator=generator,
        resident=resident,
        memory_bytes=memory_bytes,
    )
    made = plan(mask, layout, rank=rank, **prediction.schedule)
    return dataclasses.replace(made, prediction=prediction)


def plan(
    mask: Mask,
    layout: Layout | None = None,
    *,
    q_layout: Layout | None = None,
    k_layout: Layout | None = None,
    rank: int | None = None,
    group: Any = None,
    generator: str = "auto",
    resident: int = 1,
    ranks_per_node: int | None = None,
    ulysses: int | None = None,
    traveller: str | tuple[str, str] = "kv",
    like: tuple[Tensor, Tensor, Tensor] | None = None,
    shapes: Shapes | None = None,
    machine: Machine | None = None,
    memory_bytes: float | None = None,
) -> Plan:
    """Makes one rank's plan; local and pure: no communication.

    Args:
        mask: what is visible, in global positions.
        layout: of queries and keys; or q_layout and k_layout, if they differ (cross attention).
        rank, group: whose plan: a rank, or the group in which to look it up.
        generator: "direct" (own rows straight to every reader), "chain" (to the next rank, which
            forwards what is still read), "double" (a ring of nodes around rings inside nodes) or
            "auto": double with ranks_per_node, else direct, which never sends more rows than chain.
            Chain has two peers per rank whatever the world size.
        resident: travelling blocks that one step folds, in one launch, while as many arrive: 1 is a
            ring's memory, world_size - 1 gathers everything at once. For direct.
        ranks_per_node: how many consecutive ranks share a node with fast links, for double. A row
            crosses to every other node that reads it once, hidden behind a ring inside the node;
            gradients are summed inside a node before they cross.
        ulysses: deal the heads to so many consecutive ranks, with a ring of world_size / ulysses
            ranks for each share; divides the world size, ranks_per_node and the calls' kv_heads. A
            DeviceMesh of dimensions ("ring", "ulysses"), ("inter", "intra") or ("inter", "intra",
            "ulysses") as group says ulysses and ranks_per_node by itself.
        traveller: what goes around: "kv", or "q" and what belongs to it (forward: a state in fp32
            that comes home; backward: dO, and dQ that comes home), or a pair of these for forward
            and backward, or "auto": what has fewer bytes if every rank needed every row, for each
            direction; needs `like`. "q" is for direct. It pays for few queries over a long cache
            and, in the backward, for as many heads of keys as of queries.
        like: q, k and v (also meta tensors) of a call.
        shapes, machine, memory_bytes: as in ``predict``. Generator "auto" then takes the schedule
            that is predicted to be the quickest within the memory, and the plan has a prediction.

    Raises:
        ValueError: arguments that do not fit together, or no schedule fits into memory.

    Example:
        >>> p = plan(Causal(), Zigzag(8, 2), rank=0)
        >>> p.steps[0].sends[0].rows, p.flops
        (((0, 2),), (10, 8))
    """
    if (layout is None) == (q_layout is None and k_layout is None):
        refuse("plan", "layout, or q_layout and k_layout", (layout, q_layout, k_layout), "pass one")
    q_layout, k_layout = (layout, layout) if layout is not None else (q_layout, k_layout)
    for name, value in (("q_layout", q_layout), ("k_layout", k_layout)):
        if not isinstance(value, Layout):
            refuse("plan", f"a Layout as {name}", repr(value), "for example Zigzag(length, ranks)")
    assert q_layout is not None and k_layout is not None
    if not isinstance(mask, Mask):
        refuse("plan", "a Mask", repr(mask)[:80], "for example Causal()")
    if q_layout.world_size != k_layout.world_size:
        sizes = (q_layout.world_size, k_layout.world_size)
        refuse("plan", "layouts of one world size", sizes, "make both for the same group")
    largest = max(k_layout.sizes)
    if largest >= 2**31:
        refuse("plan", "shards below 2**31 rows", largest, "use more ranks")
    if (rank is None) == (group is None) and q_layout.world_size > 1:
        refuse("plan", "rank or group", (rank, group), "pass one of them")
    me = q_layout.rank_of(group if rank is None else rank)
    degrees = degrees_of(group)
    ulysses = degrees.get("ulysses", 1) if ulysses is None else ulysses
    ranks_per_node = degrees.get("ranks_per_node") if ranks_per_node is None else ranks_per_node
    if like is not None and traveller != "auto":
        refuse("plan", 'like only with traveller="auto"', repr(traveller), "leave it out")
    if shapes is not None or machine is not None or memory_bytes is not None:
        other = {
            "ulysses": None if ulysses == 1 else ulysses,
            "traveller": None if traveller == "kv" else traveller,
            "k_layout": None if k_layout == q_layout else k_layout,
        }
        given = {name: value for name, value in other.items() if value is not None}
        if shapes is None or machine is None or given:
            remedy = "predictions are of K/V that travel, queries and keys laid out alike"
            got = {"shapes": shapes, "machine": machine} | given
            refuse("plan", "both shapes and machine, without any of the others", got, remedy)
        return _predicted(
            mask, q_layout, me, generator, resident, ranks_per_node, shapes, machine, memory_bytes
        )
    if ulysses != 1:
        ring = plan(
            mask,
            q_layout=Merged.of(q_layout, ulysses),
            k_layout=Merged.of(k_layout, ulysses),
            rank=me // ulysses,
            generator=generator,
            resident=resident,
            ranks_per_node=_nodes_of_ring(q_layout.world_size, ranks_per_node, ulysses),
            traveller=traveller,
            like=like,
        )
        nodes = ranks_per_node or 1
        how = ring.generator, resident, nodes, ulysses, *ring.traveller
        digest = _digest(mask, q_layout, k_layout, *how)
        return dataclasses.replace(
            ring,
            rank=me,
            world_size=q_layout.world_size,
            q_layout=q_layout,
            k_layout=k_layout,
            ranks_per_node=nodes,
            digest=digest,
            ulysses=ulysses,
            ring=ring,
        )
    generator, locals_ = _schedule(q_layout.world_size, generator, resident, ranks_per_node)
    both = _travellers(traveller, like, q_layout, k_layout, generator)
    samples = mask.segments(q_layout.length, k_layout.length)
    reads = _planner.Reads(samples, q_layout.table, k_layout.table)
    made = {
        what: tuple(
            step_of(step) for step in reads.schedule(me, generator, resident, locals_, what == "q")
        )
        for what in set(both)
    }
    return Plan(
        rank=me,
        world_size=q_layout.world_size,
        mask=mask,
        q_layout=q_layout,
        k_layout=k_layout,
        generator=generator,
        resident=resident,
        ranks_per_node=locals_,
        traveller=both,
        steps=made[both[0]],
        backward_steps=made[both[1]],
        digest=_digest(mask, q_layout, k_layout, generator, resident, locals_, *both),
        _reads=reads,
    )
