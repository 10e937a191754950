# SPDX-License-Identifier: BSD-3-Clause
"""The ring against one process with the same threads, and against ring-attention-pytorch.

    python benchmarks/ring.py                           # the table
    python benchmarks/ring.py --json ring.json          # and as JSON

Ranks are gloo processes of one thread each, on one machine. One process with P threads computes the
whole sequence right before and after, so efficiency = its time / the ring's time carries what the
ring costs: messages, packing, waiting, and imbalance. Every figure is the best of --repeats.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import ring_attention as ra
from ring_attention import trace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKS: dict[str, ra.Mask] = {"full": ra.Full(), "causal": ra.Causal()}
PEER = "ring-attention-pytorch"


@dataclass(frozen=True)
class Problem:
    mask: str
    dtype: str
    tokens_per_rank: int
    heads: int
    kv_heads: int
    head_dim: int

    def whole(self, world_size: int) -> list[Tensor]:
        gen = torch.Generator().manual_seed(0)
        length = self.tokens_per_rank * world_size
        return [
            torch.randn(1, heads, length, self.head_dim, generator=gen).to(DTYPES[self.dtype])
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]


def timed(call: Callable[[], Tensor], inputs: list[Tensor], dout: Tensor) -> tuple[float, float]:
    """Seconds of one forward and of its backward, over all ranks."""
    times = []
    barrier()
    start = time.perf_counter()
    out = call()
    barrier()
    times.append(time.perf_counter() - start)
    start = time.perf_counter()
    torch.autograd.grad(out, inputs, dout)
    barrier()
    times.append(time.perf_counter() - start)
    return times[0], times[1]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def best(times: list[tuple[float, float]]) -> tuple[float, float]:
    return min(t[0] for t in times), min(t[1] for t in times)


def run_ours(problem: Problem, repeats: int) -> tuple[float, float, float]:
    """Forward and backward seconds, and the largest share of a rank's time spent waiting."""
    group = dist.group.WORLD
    size = dist.get_world_size()
    layout = ra.Zigzag(problem.tokens_per_rank * size, size)
    q, k, v, dout = (layout.shard(x, group, dim=2).contiguous() for x in problem.whole(size))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    made = ra.plan(MASKS[problem.mask], layout, group=group)
    ra.agree(made, group, q, k, v)

    def call() -> Tensor:
        return ra.attention(q, k, v, plan=made, group=group)

    timed(call, inputs, dout)
    times, waiting = [], []
    for _ in range(repeats):
        with trace.record() as events:
            times.append(timed(call, inputs, dout))
        waited = torch.tensor(sum(e.end_s - e.start_s for e in events if e.name == "wait"))
        dist.all_reduce(waited, dist.ReduceOp.MAX)
        waiting.append(float(waited) / sum(times[-1]))
    return *best(times), min(waiting)


def run_one_process(problem: Problem, world_size: int, repeats: int) -> tuple[float, float]:
    q, k, v, dout = problem.whole(world_size)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = MASKS[problem.mask]
    timed(lambda: ra.attention(q, k, v, mask=mask), inputs, dout)
    return best(
        [timed(lambda: ra.attention(q, k, v, mask=mask), inputs, dout) for _ in range(repeats)]
    )


def run_peer(problem: Problem, repeats: int) -> tuple[float, float] | None:
    """The peer's ring on its own striped shards, [B, S, H, D]; None where it does not run."""
    try:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn
    except ImportError:
        return None
    size = dist.get_world_size()
    layout = ra.Striped(problem.tokens_per_rank * size, size)
    q, k, v, dout = (
        layout.shard(x, dist.group.WORLD, dim=2).transpose(1, 2).contiguous()
        for x in problem.whole(size)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def call() -> Tensor:
        return ring_flash_attn(
            q,
            k,
            v,
            causal=problem.mask == "causal",
            ring_reduce_col=True,
            striped_ring_attn=True,
            ring_size=size,
        )

    try:
        timed(call, inputs, dout)
        return best([timed(call, inputs, dout) for _ in range(repeats)])
    except (RuntimeError, AssertionError):
        return None


def serve(rank: int, world_size: int, store: str, problems: list[Problem], options: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    results = []
    for problem in problems:
        results.append(
            {
                "ours": run_ours(problem, options.repeats),
                "peer": run_peer(problem, options.repeats) if options.peer else None,
            }
        )
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def in_ranks(world_size: int, problems: list[Problem], options: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(serve, (world_size, store, problems, options), nprocs=world_size)
        return json.loads(Path(f"{store}.json").read_text())


def flops(problem: Problem, world_size: int) -> float:
    """Multiplications and additions of a forward, for visible pairs only."""
    length = problem.tokens_per_rank * world_size
    pairs = length * (length + 1) / 2 if problem.mask == "causal" else length**2
    return 4.0 * pairs * problem.head_dim * problem.heads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="ring size (default 2)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[2048, 8192],
        metavar="N",
        help="tokens per rank (default 2048 8192)",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="best of this many (default 3)")
    parser.add_argument(
        "--no-peer",
        dest="peer",
        action="store_false",
        help=f"leave out {PEER} (pip install {PEER}==0.5.20)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()

    problems = [
        Problem(mask, dtype, tokens, options.heads, options.kv_heads, options.head_dim)
        for tokens in options.tokens
        for dtype in options.dtype
        for mask in options.mask
    ]
    torch.set_num_threads(options.ranks)
    print(
        f"{platform.machine()}, torch {torch.__version__}, kernels: {ra.isa_name()}, "
        f"{options.ranks} ranks of one thread, H={options.heads} G={options.kv_heads} "
        f"D={options.head_dim}, best of {options.repeats}\n"
    )
    print("tokens/rank dtype mask    GFLOP/s fwd  bwd   efficiency fwd  bwd   waiting   vs peer")
    rows = []
    for problem in problems:
        alone = run_one_process(problem, options.ranks, options.repeats)
        (ring,) = in_ranks(options.ranks, [problem], options)
        again = run_one_process(problem, options.ranks, options.repeats)
        alone = min(alone[0], again[0]), min(alone[1], again[1])
        forward_s, backward_s, waiting = ring["ours"]
        peer = ring["peer"]
        ratio = sum(peer) / (forward_s + backward_s) if peer else None
        work = flops(problem, options.ranks)
        rows.append(
            asdict(problem)
            | {
                "forward_s": forward_s,
                "backward_s": backward_s,
                "one_process_forward_s": alone[0],
                "one_process_backward_s": alone[1],
                "waiting": waiting,
                "peer_forward_s": peer[0] if peer else None,
                "peer_backward_s": peer[1] if peer else None,
            }
        )
        print(
            f"{problem.tokens_per_rank:11d} {problem.dtype:5} {problem.mask:7}"
            f"{work / forward_s / 1e9:12.0f} {2.5 * work / backward_s / 1e9:4.0f}"
            f"{100 * alone[0] / forward_s:15.0f}% {100 * alone[1] / backward_s:3.0f}%"
            f"{100 * waiting:9.1f}% " + (f"{ratio:8.1f}x" if ratio else "        -")
        )
    print(
        "\nefficiency: one process with as many threads / the ring. waiting: the worst rank's "
        f"share. vs peer: {PEER} 0.5.20, forward + backward, same run (-: not installed, or it "
        "raises for this dtype)."
    )
    if options.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "isa": ra.isa_name()}
        options.json.write_text(
            json.dumps(about | {"ranks": options.ranks, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
