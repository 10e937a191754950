# SPDX-License-Identifier: BSD-3-Clause
"""The ring against one process with the same threads, and against ring-attention-pytorch.

    python benchmarks/ring.py                           # the table
    python benchmarks/ring.py --json ring.json          # and as JSON
    torchrun --nproc-per-node 8 benchmarks/ring.py --device cuda --tokens 8192 --heads 32

Ranks are gloo processes of one thread each, on one machine. In every round the ring runs, then the
peer's ring, then rank 0 alone with P threads on the whole sequence, while the others sleep. So
efficiency = alone / ring carries what the ring costs: messages, packing, waiting, and imbalance.
By the clock a rank that the machine holds up holds up the ring; by CPU time it does not, but then
waiting does not count either.
Ratios are medians over the rounds of ratios taken within a round; rates are those of the best one.

With --device cuda the ranks are those of torchrun, a GPU each, over NCCL. What is alone is one GPU
then, so efficiency = alone / (P ring); and the host waits for nothing, so waiting says nothing.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
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
            torch.randn(1, heads, length, self.head_dim, generator=gen).to(
                device(), DTYPES[self.dtype]
            )
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]


@dataclass(frozen=True)
class Seconds:
    """Of one forward and its backward, until all ranks are done; waiting: of the worst rank."""

    forward: float
    backward: float
    waiting: float = 0.0
    cpu_forward: float = 0.0  # CPU time of all ranks
    cpu_backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


Contestant = Callable[[], Seconds]


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def finished(alone: bool) -> None:
    """Returns when this rank's work is done and, not alone, that of all."""
    if device() == "cuda":
        torch.cuda.synchronize()
    if not alone:
        dist.barrier()


def timed(call: Callable[[], Tensor], inputs: list[Tensor], dout: Tensor, alone: bool) -> Seconds:
    finished(alone)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    out = call()
    finished(alone)
    middle_s, middle_cpu_s = time.perf_counter(), time.process_time()
    torch.autograd.grad(out, inputs, dout)
    finished(alone)
    end_s, end_cpu_s = time.perf_counter(), time.process_time()
    cpu_s = torch.tensor([middle_cpu_s - start_cpu_s, end_cpu_s - middle_cpu_s], device=device())
    if not alone:
        dist.all_reduce(cpu_s)
    return Seconds(middle_s - start_s, end_s - middle_s, 0.0, *cpu_s.tolist())


def ring(problem: Problem) -> Contestant:
    group = dist.group.WORLD
    size = dist.get_world_size()
    layout = ra.Zigzag(problem.tokens_per_rank * size, size)
    q, k, v, dout = (layout.shard(x, group, dim=2).contiguous() for x in problem.whole(size))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    made = ra.plan(MASKS[problem.mask], layout, group=group)
    ra.agree(made, group, q, k, v)

    def run() -> Seconds:
        with trace.record() as events:
            seconds = timed(
                lambda: ra.attention(q, k, v, plan=made, group=group), inputs, dout, alone=False
            )
        # On CUDA the host waits for nothing: what the trace sees is not the GPU's waiting.
        waited_s = torch.tensor(
            sum(e.end_s - e.start_s for e in events if e.name == "wait"), device=device()
        )
        dist.all_reduce(waited_s, dist.ReduceOp.MAX)
        return replace(seconds, waiting=float(waited_s))

    return run


def peer_ring(problem: Problem) -> Contestant | None:
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
        timed(call, inputs, dout, alone=False)
    except (RuntimeError, AssertionError):
        return None
    return lambda: timed(call, inputs, dout, alone=False)


def one_process(problem: Problem) -> Contestant:
    """Rank 0 alone, with the threads of all; the other ranks sleep in a barrier meanwhile."""
    size = dist.get_world_size()
    if dist.get_rank() != 0:

        def run() -> Seconds:
            dist.barrier()
            return Seconds(0.0, 0.0)

        return run
    q, k, v, dout = problem.whole(size)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = MASKS[problem.mask]

    def run() -> Seconds:
        torch.set_num_threads(min(size, len(os.sched_getaffinity(0))))
        seconds = timed(lambda: ra.attention(q, k, v, mask=mask), inputs, dout, alone=True)
        torch.set_num_threads(1)
        dist.barrier()
        return seconds

    return run


def serve(rank: int, world_size: int, store: str, problem: Problem, options: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    rounds = compete(problem, options)
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(rounds))
    dist.destroy_process_group()


def compete(problem: Problem, options: Any) -> list[dict[str, dict[str, float]]]:
    contestants = {"ring": ring(problem), "alone": one_process(problem)}
    if options.peer and (peer := peer_ring(problem)):
        contestants["peer"] = peer
    rounds = []
    for _ in range(1 + options.rounds):
        rounds.append({name: asdict(run()) for name, run in contestants.items()})
    return rounds[1:]  # the first one warms up


def measure(world_size: int, problem: Problem, options: Any) -> list[dict[str, Seconds]]:
    """The rounds, each with the contestants that ran."""
    if options.device == "cuda":
        return [{n: Seconds(**s) for n, s in r.items()} for r in compete(problem, options)]
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(serve, (world_size, store, problem, options), nprocs=world_size)
        rounds = json.loads(Path(f"{store}.json").read_text())
    return [{name: Seconds(**seconds) for name, seconds in r.items()} for r in rounds]


def flops(problem: Problem, world_size: int) -> float:
    """Multiplications and additions of a forward, for visible pairs only."""
    length = problem.tokens_per_rank * world_size
    pairs = length * (length + 1) / 2 if problem.mask == "causal" else length**2
    return 4.0 * pairs * problem.head_dim * problem.heads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], metavar="P", help="ring sizes (default 2)"
    )
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
    parser.add_argument("--rounds", type=int, default=7, help="after one to warm up (default 7)")
    parser.add_argument(
        "--no-peer",
        dest="peer",
        action="store_false",
        help=f"leave out {PEER} (pip install {PEER}==0.5.20)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rounds as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda":
        if "LOCAL_RANK" not in os.environ:
            parser.error("expected torchrun with --device cuda: one rank per GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        options_nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        dist.init_process_group("nccl", pg_options=options_nccl)
        options.ranks, options.peer = [dist.get_world_size()], False
        if dist.get_rank() != 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, kernels: {ra.isa_name()}, ranks of one "
        f"thread, H={options.heads} G={options.kv_heads} D={options.head_dim}, "
        f"{options.rounds} rounds\n"
    )
    print(
        "ranks tokens/rank dtype mask    GFLOP/s fwd  bwd   efficiency fwd  bwd  CPU fwd  bwd   "
        "waiting   vs peer"
    )
    rows = []
    for size, tokens, dtype, mask in itertools.product(
        options.ranks, options.tokens, options.dtype, options.mask
    ):
        problem = Problem(mask, dtype, tokens, options.heads, options.kv_heads, options.head_dim)
        rounds = measure(size, problem, options)
        rows.append(
            {"ranks": size, "problem": asdict(problem)}
            | {"rounds": [{name: asdict(s) for name, s in r.items()} for r in rounds]}
        )
        work = flops(problem, size)
        # Alone is one GPU, not as many as there are ranks.
        per_gpu = 1 / size if options.device == "cuda" else 1.0
        peer = [r["peer"].total / r["ring"].total for r in rounds if "peer" in r]

        def percent(
            share: Callable[[dict[str, Seconds]], float], of: float = 1.0, rounds: Any = rounds
        ) -> str:
            return f"{100 * of * median(map(share, rounds)):4.0f}%"

        print(
            f"{size:5d} {tokens:11d} {dtype:5} {mask:7}"
            f"{work / min(r['ring'].forward for r in rounds) / 1e9:12.0f}"
            f"{2.5 * work / min(r['ring'].backward for r in rounds) / 1e9:5.0f}           "
            + percent(lambda r: r["alone"].forward / r["ring"].forward, per_gpu)
            + percent(lambda r: r["alone"].backward / r["ring"].backward, per_gpu)
            + "    "
            + percent(lambda r: r["alone"].cpu_forward / r["ring"].cpu_forward)
            + percent(lambda r: r["alone"].cpu_backward / r["ring"].cpu_backward)
            + f"{100 * median(r['ring'].waiting / r['ring'].total for r in rounds):9.1f}% "
            + (f"{median(peer):8.1f}x" if peer else "        -"),
            flush=True,
        )
    print(
        "\nGFLOP/s: of the best round, over all ranks. efficiency: one process with as many "
        "threads\n(no more than there are cores) / the ring; CPU: the same of CPU time. waiting: "
        f"the worst rank's share.\nvs peer: {PEER} 0.5.20, forward + backward (-: not installed, "
        "or raises for the dtype)."
    )
    if options.device == "cuda" and dist.get_rank() != 0:
        options.json = None
    if options.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "isa": ra.isa_name()}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1))
    if options.device == "cuda":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
