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
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import _planner
from .layout import Layout
from .mask_algebra import Mask, at_least, refuse
from .merged import Merged
from .registry import register
from .ring import degrees_of

GENERATORS: tuple[str, ...] = _planner.GENERATORS
# Key intervals that a plan keeps; with more, the least recently used blocks are computed again.
INTERVAL_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Transfer:
    """One message of K/V rows (or of their gradients).

    Attributes:
        peer: the rank in the group that it goes to or comes from.
        origin: the rank that owns the rows.
        hop: its place in the order in which all ranks post: K/V of hop t, then gradients of
            hop t - 1, then K/V of hop t + 1.
        due: the hop after which it is complete: its own (the next one, of gradients), or a later
            one if a slow link has several folds to hide behind.
        ranges: which rows, as the planner keeps them; see Step for what they count from.
    """

    peer: int
    origin: int
    hop: int
    due: int
    ranges: _planner.Ranges = field(repr=False, compare=False)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """The rows as ascending (begin, end) ranges; never empty."""
        return self.ranges.tuples()

    def index(self) -> Tensor:
        """The rows one by one, int64 [num_rows]: quicker than thousands of ranges."""
        index = torch.empty(self.num_rows, dtype=torch.int64)
        self.ranges.fill(index.data_ptr())
        return index

    @property
    def num_rows(self) -> int:
        """How many rows travel."""
        return self.ranges.rows

    @property
    def num_ranges(self) -> int:
        """How many stretches they form: ``len(rows)``, without making them."""
        return len(self.ranges)

    def __repr__(self) -> str:
        return f"Transfer(peer={self.peer}, origin={self.origin}, {self.num_rows} rows)"


@dataclass(frozen=True)
class Step:
    """What a rank does between two waits.

    Attributes:
        number: the hop at which it folds; ascending, with gaps where nothing is to be done.
        folds: origins whose blocks are folded; the own block is in the first step, if at all.
        sends: K/V posted before the folds; rows count from the block as this rank holds it.
        recvs: K/V posted before the folds, used in steps after the hop at which they are due; rows
            count from the origin's shard, and the block as held is those rows, concatenated.
        grad_sends: in backward, what has been summed of the dK/dV of blocks up to this step, posted
            after it: to their owner, or to a rank that sums first; only rows touched, counted from
            the block as held.
        grad_recvs: contributions to the dK/dV of the own shard, or of a block whose gradients this
            rank sums, posted at the same place; rows count from that block as held.
        release: received blocks that are dead after this step (never the own one).
        flops: visible query-key pairs of the folds, per head: 4 head_dim flops each in forward.
    """

    number: int
    folds: tuple[int, ...]
    sends: tuple[Transfer, ...]
    recvs: tuple[Transfer, ...]
    grad_sends: tuple[Transfer, ...]
    grad_recvs: tuple[Transfer, ...]
    release: tuple[int, ...]
    flops: int

    @property
    def rows(self) -> int:
        """K/V rows sent in this step."""
        return sum(t.num_rows for t in self.sends)

    @property
    def grad_rows(self) -> int:
        """dK/dV rows sent in this step of backward."""
        return sum(t.num_rows for t in self.grad_sends)


def _step(step: _planner.Step) -> Step:
    def transfers(listed: list[_planner.Transfer]) -> tuple[Transfer, ...]:
        return tuple(Transfer(t.peer, t.origin, t.hop, t.due, t.ranges) for t in listed)

    return Step(
        number=step.number,
        folds=tuple(step.folds),
        sends=transfers(step.sends),
        recvs=transfers(step.recvs),
        grad_sends=transfers(step.grad_sends),
        grad_recvs=transfers(step.grad_recvs),
        release=tuple(step.release),
        flops=step.flops,
    )


class _Cache:
    """Tensors by origin, least recently used first out; shared by the threads of a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pairs: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, origin: int) -> tuple[Tensor, Tensor] | None:
        with self.lock:
            if origin in self.pairs:
                self.pairs.move_to_end(origin)
            return self.pairs.get(origin)

    def put(self, origin: int, pair: tuple[Tensor, Tensor]) -> None:
        with self.lock:
            self.pairs[origin] = pair
            while len(self.pairs) > 1 and self.nbytes() > INTERVAL_CACHE_BYTES:
                self.pairs.popitem(last=False)

    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for pair in self.pairs.values() for t in pair)


@dataclass(frozen=True)
class Plan:
    """One rank's part of a distributed attention call; made by ``plan``.

    Attributes:
        rank, world_size: whose plan, of how many.
        mask, q_layout, k_layout, generator, resident, ranks_per_node, ulysses: what it was made
            from.
        steps: what to do; at least one. With ulysses > 1 they are those of `ring`.
        ring: with ulysses > 1, the plan of this rank's ring of world_size / ulysses ranks, over the
            merged layouts and for its share of the heads; None without.
        own_split: rows of the own key block in front of the point where half its flops are done.
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
    own_split: int = field(repr=False, compare=False)
    digest: int = field(repr=False)
    _reads: _planner.Reads = field(repr=False, compare=False)
    ulysses: int = 1
    ring: Plan | None = field(default=None, repr=False, compare=False)
    _cache: _Cache = field(default_factory=_Cache, repr=False, compare=False)

    def intervals(self, origin: int) -> tuple[Tensor, Tensor]:
        """What the own query rows see of a block that this rank folds.

        Rows count from the block as held (see Step), so kernels can take them as they are. Kept for
        the next call, up to INTERVAL_CACHE_BYTES per plan.

        Returns:
            key_begin, key_end: int32 [n, B or 1, q_len] on the CPU, ``begin == end`` for a row that
            sees nothing; expanded (stride 0) if all rows are alike.
        """
        if self.ring is not None:
            return self.ring.intervals(origin)
        cached = self._cache.get(origin)
        if cached is not None:
            return cached
        if origin not in self._held:
            refuse("Plan.intervals", f"an origin of {sorted(self._held)}", origin, "see Plan.steps")
        view = self._reads.key_intervals(self.rank, origin, self._held[origin])
        samples, rows = self._samples, self.q_layout.sizes[self.rank]
        both = torch.empty(2, view.most, samples, view.rows, dtype=torch.int32)
        used = view.fill(both[0].data_ptr(), both[1].data_ptr())
        if used < view.most:
            both = both[:, :used].clone()
        begin, end = both.expand(2, used, samples, rows)
        self._cache.put(origin, (begin, end))
        return begin, end

    @cached_property
    def handle(self) -> Tensor:
        """An int64 CPU tensor that stands for this plan in compiled graphs; see registry.py."""
        return register(self)

    @cached_property
    def _samples(self) -> int:
        return self._reads.samples

    @cached_property
    def _held(self) -> dict[int, _planner.Ranges]:
        own = _planner.Ranges([(0, self.k_layout.sizes[self.rank])])
        return {self.rank: own} | {t.origin: t.ranges for s in self.steps for t in s.recvs}

    @cached_property
    def held_rows(self) -> dict[int, int]:
        """Rows of every block that this rank holds at some time, by origin."""
        return {origin: ranges.rows for origin, ranges in self._held.items()}

    @cached_property
    def last_due(self) -> int:
        """The hop after which nothing is under way any more."""
        transfers = [
            t for s in self.steps for t in (*s.sends, *s.recvs, *s.grad_sends, *s.grad_recvs)
        ]
        return max([self.steps[-1].number, *(t.due for t in transfers)])

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


def _ring(
    mask: Mask,
    q_layout: Layout,
    k_layout: Layout,
    rank: int,
    generator: str,
    resident: int,
    ranks_per_node: int | None,
    ulysses: int,
) -> Plan:
    """The plan of the ring of a rank under Ulysses."""
    world = q_layout.world_size
    fits = [n for n in range(1, world + 1) if world % n == 0]
    if ulysses not in fits:
        refuse("plan", f"ulysses of {fits}", ulysses, f"it splits {world} ranks")
    if ranks_per_node is not None:
        if ranks_per_node % ulysses:
            remedy = "a Ulysses group does not cross nodes"
            refuse("plan", f"ulysses to divide ranks_per_node = {ranks_per_node}", ulysses, remedy)
        ranks_per_node //= ulysses
        if ranks_per_node == 1 or ulysses == world:  # a ring with one rank in each node, or of one
            ranks_per_node = None
    return plan(
        mask,
        q_layout=Merged.of(q_layout, ulysses),
        k_layout=Merged.of(k_layout, ulysses),
        rank=rank // ulysses,
        generator=generator,
        resident=resident,
        ranks_per_node=ranks_per_node,
    )


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

    Raises:
        ValueError: arguments that do not fit together.

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
    if ulysses != 1:
        ring = _ring(mask, q_layout, k_layout, me, generator, resident, ranks_per_node, ulysses)
        nodes = ranks_per_node or 1
        digest = _digest(mask, q_layout, k_layout, ring.generator, resident, nodes, ulysses)
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
    samples = mask.segments(q_layout.length, k_layout.length)
    reads = _planner.Reads(samples, q_layout.table, k_layout.table)
    return Plan(
        rank=me,
        world_size=q_layout.world_size,
        mask=mask,
        q_layout=q_layout,
        k_layout=k_layout,
        generator=generator,
        resident=resident,
        ranks_per_node=locals_,
        steps=tuple(_step(step) for step in reads.schedule(me, generator, resident, locals_)),
        own_split=reads.own_split(me),
        digest=_digest(mask, q_layout, k_layout, generator, resident, locals_),
        _reads=reads,
    )
