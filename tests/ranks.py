# SPDX-License-Identifier: BSD-3-Clause
"""Pools of real processes, gloo's or NCCL's, one per world size, started once per test session."""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CALL_TIMEOUT_S = 120.0


def _serve(rank: int, world_size: int, port: int, backend: str, calls: Any, results: Any) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % gpus)
        if world_size > gpus:  # NCCL refuses ranks that share a GPU, but not those of several hosts
            os.environ.update(NCCL_HOSTID=str(rank), NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    store = dist.TCPStore(
        "127.0.0.1", port, world_size, is_master=False, timeout=timedelta(seconds=60)
    )
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while (call := calls.get()) is not None:
        fn, args = call
        try:
            results.put((rank, True, fn(dist.group.WORLD, *args)))
        except BaseException as error:
            results.put((rank, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class RankPool:
    """P processes that run `fn(group, *args)`, for module-level functions and picklable values."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        context = mp.get_context("spawn")
        self.world_size = world_size
        self._store = dist.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False
        )
        self._calls = [context.Queue() for _ in range(world_size)]
        self._results = context.Queue()
        self.processes = [
            context.Process(
                target=_serve,
                args=(
                    rank,
                    world_size,
                    self._store.port,
                    backend,
                    self._calls[rank],
                    self._results,
                ),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def outcomes(self, fn: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """Per rank: (True, what it returned) or (False, its error as text)."""
        for calls in self._calls:
            calls.put((fn, args))
        answers = [self._results.get(timeout=CALL_TIMEOUT_S) for _ in range(self.world_size)]
        return [(ok, value) for _, ok, value in sorted(answers, key=lambda answer: answer[0])]

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned, in rank order."""
        outcomes = self.outcomes(fn, *args)
        failed = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(outcomes) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in outcomes]

    def close(self) -> None:
        for calls in self._calls:
            calls.put(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def pool(world_size: int) -> Iterator[RankPool]:
    """A pool of one's own, for tests that leave their group unusable."""
    ranks = RankPool(world_size)
    try:
        yield ranks
    finally:
        ranks.close()
