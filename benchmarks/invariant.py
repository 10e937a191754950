# SPDX-License-Identifier: BSD-3-Clause
"""What invariant=True costs in time, against the ordinary plan.

    python benchmarks/invariant.py                            # the table
    python benchmarks/invariant.py --ranks 1 --tokens 4096    # one problem
    python benchmarks/invariant.py --json invariant.json      # and as JSON

Ranks are gloo processes of one thread each, causal, zigzag. In every round a forward and its
backward run once with either plan; ratios are medians over the rounds of ratios taken within a
round, of CPU time of all ranks and of time by the clock. What it costs in memory is counted from
plans: `python -m ring_attention plan --invariant` says it.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ring_attention as ra

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    ranks: int
    tokens: int
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    tiles: int


@dataclass(frozen=True)
class Cost:
    """Of a forward and its backward: by the clock until all ranks are done, CPU time of all."""

    forward_s: float
    backward_s: float
    cpu_forward_s: float
    cpu_backward_s: float


def run(
    plan: ra.Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> Cost:
    group = dist.group.WORLD
    dist.barrier()
    stamps = [(time.perf_counter(), time.process_time())]
    out = ra.attention(q, k, v, plan=plan, group=group)
    dist.barrier()
    stamps.append((time.perf_counter(), time.process_time()))
    torch.autograd.grad(out, (q, k, v), dout)
    dist.barrier()
    stamps.append((time.perf_counter(), time.process_time()))
    cpu_s = torch.tensor([b[1] - a[1] for a, b in itertools.pairwise(stamps)])
    dist.all_reduce(cpu_s)
    forward_s, backward_s = (b[0] - a[0] for a, b in itertools.pairwise(stamps))
    return Cost(forward_s, backward_s, *cpu_s.tolist())


def serve(rank: int, store: str, problem: Problem, rounds: int) -> None:
    torch.set_num_threads(1)
    size = problem.ranks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    layout = ra.Zigzag(problem.tokens, size)
    gen = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        layout.shard(
            torch.randn(1, heads, problem.tokens, problem.head_dim, generator=gen), rank, dim=2
        ).to(DTYPES[problem.dtype])
        for heads in (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    plans = {
        "ordinary": ra.plan(ra.Causal(), layout, rank=rank, traveller="kv"),
        "invariant": ra.plan(ra.Causal(), layout, rank=rank, invariant=problem.tiles),
    }
    for plan in plans.values():
        ra.agree(plan, dist.group.WORLD, *inputs)
    results = [
        {name: asdict(run(plan, *inputs, dout)) for name, plan in plans.items()}
        for _ in range(1 + rounds)
    ]
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(results[1:]))  # the first one warms up
    dist.destroy_process_group()


def measure(problem: Problem, rounds: int) -> list[dict[str, Cost]]:
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(serve, (store, problem, rounds), nprocs=problem.ranks)
        listed = json.loads(Path(f"{store}.json").read_text())
    return [{name: Cost(**cost) for name, cost in each.items()} for each in listed]


def ratio(rounds: list[dict[str, Cost]], field: str) -> float:
    return median(getattr(r["invariant"], field) / getattr(r["ordinary"], field) for r in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="P")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=16, help="default 16")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rounds as JSON")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(
        f"torch {torch.__version__}, kernels: {ra.isa_name()}, causal, zigzag, H={options.heads} "
        f"G={options.kv_heads} D={options.head_dim}, {options.tiles} tiles, {options.rounds} rounds"
    )
    print("invariant over ordinary\n\nranks tokens dtype  CPU fwd   bwd   clock fwd   bwd")
    rows = []
    for ranks, tokens, dtype in itertools.product(options.ranks, options.tokens, options.dtype):
        shape = (options.heads, options.kv_heads, options.head_dim)
        problem = Problem(ranks, tokens, dtype, *shape, options.tiles)
        rounds = measure(problem, options.rounds)
        listed = [{name: asdict(cost) for name, cost in r.items()} for r in rounds]
        rows.append({"problem": asdict(problem), "rounds": listed})
        print(
            f"{ranks:5d} {tokens:6d} {dtype:5} {ratio(rounds, 'cpu_forward_s'):8.2f} "
            f"{ratio(rounds, 'cpu_backward_s'):5.2f} {ratio(rounds, 'forward_s'):11.2f} "
            f"{ratio(rounds, 'backward_s'):5.2f}",
            flush=True,
        )
    if options.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "isa": ra.isa_name()}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
