# SPDX-License-Identifier: BSD-3-Clause
"""Virtual ranks: P threads of one process, with the plans, messages and bytes of a real ring."""

import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import agreement
from .groups import register
from .ring import Message, Pending, RingError, Transport, pack, timeout_s

T = TypeVar("T")
_worlds = itertools.count()


class _Half:
    """One side of a message, waiting for the other."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.done = threading.Event()


class _World:
    """What the virtual ranks of one run share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.name = f"virtual/{next(_worlds)}"
        self.store = dist.HashStore()
        self.barrier = threading.Barrier(size)
        self.slots: list[Tensor | None] = [None] * size
        self.lock = threading.Lock()
        self.failed = False
        # (source, destination, kind) -> halves posted by one side and not yet by the other
        self.unmatched: dict[tuple[int, int, str], deque[_Half]] = defaultdict(deque)

    def fail(self, error: BaseException) -> None:
        """Wakes every rank that waits for one that will not come."""
        agreement.poison(self.store, f"ring_attention: another virtual rank failed: {error}")
        with self.lock:
            self.failed = True
            for halves in self.unmatched.values():
                for half in halves:
                    half.done.set()
        self.barrier.abort()

    def post(self, rank: int, message: Message) -> _Half:
        """Whoever posts second copies, so that nobody has to wait in any particular order."""
        half = _Half(message)
        source, destination = (rank, message.peer) if message.sending else (message.peer, rank)
        with self.lock:
            halves = self.unmatched[source, destination, message.kind]
            if not halves or halves[0].message.sending == message.sending:
                halves.append(half)
                if self.failed:
                    half.done.set()
                return half
            other = halves.popleft()
        send, receive = (half, other) if message.sending else (other, half)
        if send.message.flat.numel() != receive.message.flat.numel():
            raise RingError(
                f"ring_attention: virtual rank {source} is {send.message}, but virtual rank "
                f"{destination} is {receive.message}; their plans differ"
            )
        receive.message.flat.copy_(send.message.flat)
        half.done.set()
        other.done.set()
        return half


class _Halves(Pending):
    def __init__(self, world: _World, halves: Sequence[_Half]) -> None:
        self._world = world
        self._halves = halves

    def wait(self) -> None:
        for half in self._halves:
            arrived = half.done.wait(timeout_s())
            if self._world.failed or not arrived:
                why = "another virtual rank failed" if self._world.failed else "it never arrived"
                raise RingError(f"ring_attention: {half.message}, failed: {why}")


class VirtualGroup(Transport):
    """One virtual rank's group; accepted wherever a group is. Made by `run_virtual`."""

    def __init__(self, world: _World, rank: int) -> None:
        super().__init__()
        self._world = world
        self.rank = rank
        self.size = world.size
        self.name = f"{world.name}/{rank}"

    @property
    def ring(self) -> str:
        return self._world.name

    @property
    def place(self) -> str:
        return f"virtual{self.rank}"

    @property
    def store(self) -> Any:
        return self._world.store

    def post(self, messages: Sequence[Message]) -> Pending:
        pack(messages)
        return _Halves(self._world, [self._world.post(self.rank, m) for m in messages])

    def gather_equal(self, x: Tensor) -> list[Tensor]:
        world = self._world
        try:
            world.slots[self.rank] = x
            world.barrier.wait(timeout_s())
            gathered = [slot.clone() for slot in world.slots if slot is not None]
            world.barrier.wait(timeout_s())  # nobody may overwrite a slot that is being read
        except threading.BrokenBarrierError:
            raise RingError("ring_attention: another virtual rank failed in a collective") from None
        return gathered

    def sum_(self, x: Tensor) -> None:
        total = torch.zeros_like(x)
        for part in self.gather_equal(x.detach()):
            total += part
        x.detach().copy_(total)


def run_virtual(world_size: int, fn: Callable[..., T], *args: Any) -> list[T]:
    """Runs `fn(group, *args)` on every rank of a ring of threads in this process.

    The ranks run the same plan and send the same messages as processes would; only the wire is a
    copy. The process's kernel threads are divided among them.

    Args:
        world_size: P >= 1.
        fn: called with the rank's `VirtualGroup` first.
        args: passed to every rank.

    Returns:
        What each rank returned, in rank order.

    Raises:
        The exception of the rank that failed first; the others are woken and stop.

    Example:
        >>> def rank(group, q, k, v):
        ...     layout = Zigzag(q.shape[2], group.size)
        ...     shards = [layout.shard(x, group, dim=2) for x in (q, k, v)]
        ...     return attention(*shards, group=group, layout=layout)
        >>> outs = run_virtual(4, rank, q, k, v)
    """
    if world_size < 1:
        raise ValueError(f"ring_attention.run_virtual: expected world_size >= 1, got {world_size}")
    world = _World(world_size)
    groups = [VirtualGroup(world, rank) for rank in range(world_size)]
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    grad_enabled = torch.is_grad_enabled()
    threads = torch.get_num_threads()

    def run(group: VirtualGroup) -> None:
        register(group)
        torch.set_num_threads(max(1, threads // world_size))
        try:
            # A GPU has one thread for the backwards of all: a rank that waits there for another one
            # would hold it up. So each rank runs its own.
            with (
                torch.set_grad_enabled(grad_enabled),
                torch.autograd.set_multithreading_enabled(False),
            ):
                results[group.rank] = fn(group, *args)
        except BaseException as error:
            errors.append(error)
            world.fail(error)

    workers = [
        threading.Thread(target=run, args=(group,), name=group.name, daemon=True)
        for group in groups
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(threads)
    if errors:
        # A rank's own error explains more than the RingError of those it left waiting.
        raise next((error for error in errors if not isinstance(error, RingError)), errors[0])
    return [results[rank] for rank in range(world_size)]
