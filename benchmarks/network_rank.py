# SPDX-License-Identifier: BSD-3-Clause
"""One rank of the network benchmark: makes the calls that its launcher asks for, and times them.

A process of one thread, started on its side of the links: commands on stdin, results on stdout, a
JSON line each.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ring_attention as ra
from ring_attention import trace
from ring_attention.groups import transport_of
from ring_attention.ring import Message, Pending, pack
from ring_attention.trace_files import Writer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKS: dict[str, ra.Mask] = {"full": ra.Full(), "causal": ra.Causal()}


@dataclass(frozen=True)
class Shape:
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int


class _Unsent(Pending):
    """Messages that are packed, and stay where they are."""

    def __init__(self, messages: Sequence[Message]) -> None:
        pack(messages)

    def wait(self) -> None:
        return None


class Rank:
    """One rank's side: what the launcher asks for by name."""

    def __init__(self, rank: int, size: int, store: str, shape: Shape) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        self.size, self.rank, self.shape = size, rank, shape
        self.group = dist.group.WORLD
        self.transport: Any = transport_of(self.group)
        self.post: Callable[..., Pending] = self.transport.post

    def link(self, nbytes: int) -> dict[str, float]:
        """Bytes/s to the next rank while as many come from the one before, after a pause.

        And CPU seconds per byte sent or received.
        """
        out, into = (torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2))
        rates, taken = [], []
        for _ in range(8):
            self._start_together()
            start_s, cpu_s = time.monotonic(), time.process_time()
            works = [
                dist.irecv(into, (self.rank - 1) % self.size),
                dist.isend(out, (self.rank + 1) % self.size),
            ]
            for work in works:
                work.wait()
            rates.append(nbytes / (time.monotonic() - start_s))
            taken.append((time.process_time() - cpu_s) / (2 * nbytes))
        return {"bytes_s": median(rates[1:]), "cpu_s_per_byte": median(taken[1:])}

    def _call(self, mask: str, tokens: int, direction: str) -> Callable[[], Any]:
        shape, layout = self.shape, ra.Zigzag(tokens * self.size, self.size)
        gen = torch.Generator().manual_seed(self.rank)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        q, k, v, dout = (
            torch.randn(1, h, tokens, shape.head_dim, generator=gen).to(DTYPES[shape.dtype])
            for h in heads
        )
        made = ra.plan(MASKS[mask], layout, group=self.group)
        ra.agree(made, self.group, q, k, v)
        if direction == "forward":
            return lambda: ra.attention(q, k, v, plan=made, group=self.group)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = ra.attention(q, k, v, plan=made, group=self.group)
        assert isinstance(out, Tensor)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    def _start_together(self) -> None:
        """Returns at the same time on all ranks, by the machine's clock, and leaves gloo at rest.

        Some ranks leave a barrier 10 ms late: gloo's threads spin on their cores, see post.
        """
        at_s = torch.tensor([time.monotonic() + 0.03], dtype=torch.float64)
        dist.broadcast(at_s, 0)
        time.sleep(max(0.0, float(at_s) - time.monotonic()))

    def run(
        self,
        mask: str,
        tokens: int,
        direction: str,
        rounds: int,
        sending: list[bool],
        folder: str | None,
    ) -> dict[str, Any]:
        """Times a call, with and without its messages sent."""
        call = self._call(mask, tokens, direction)
        taken, kept = [], []
        for turn in range(1 + rounds):
            for send in (True, False) if turn == 0 else sending:
                self.transport.post = self.post if send else _Unsent
                self._start_together()
                cpu_s, start_s = time.process_time(), time.monotonic()
                with trace.record() as events:
                    call()
                end_s = time.monotonic()
                if turn and send:
                    kept += events
                waits = [e for e in events if e.name == "wait"]
                taken.append(
                    {
                        "turn": turn,
                        "sending": send,
                        "start_s": start_s,
                        "end_s": end_s,
                        "cpu_s": time.process_time() - cpu_s,
                        "bytes": sum(e.bytes for e in events if e.name == "post"),
                        "posts": [[e.start_s, e.end_s] for e in events if e.name == "post"],
                        "arrived_s": [e.end_s for e in waits],
                        "hops": [
                            {
                                "bytes": max(
                                    sum(leg.bytes for leg in e.legs if leg.sending == way)
                                    for way in (True, False)
                                ),
                                "moved": e.bytes,
                                "waited_s": e.seconds,
                                "hiding_s": sum(
                                    c.seconds
                                    for c in events
                                    if c.name == "compute" and c.step == e.step
                                ),
                            }
                            for e in waits
                        ],
                    }
                    | {
                        name: sum(e.seconds for e in events if e.name == name)
                        for name in ("compute", "post", "wait")
                    }
                )
        self.transport.post = self.post
        if folder is not None:
            writer = Writer(folder)
            for event in kept:
                writer.add(event)
            writer.close()
        return {"runs": [run for run in taken if run["turn"]]}


def serve(rank: int, size: int, store: str, shape: Shape) -> None:
    """Answers the launcher until its pipe closes."""
    served = Rank(rank, size, store, shape)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(served, name)(**arguments)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    size, store, shape = json.loads(sys.argv[2])
    serve(int(sys.argv[1]), size, store, Shape(**shape))
