# SPDX-License-Identifier: BSD-3-Clause
"""Exact causal attention over a million tokens, on two processes of one thread each.

    python benchmarks/million.py                            # 1,048,576 tokens, forward
    python benchmarks/million.py --backward                 # and the gradients
    python benchmarks/million.py --tokens 16K --backward    # a trial
    python benchmarks/million.py --json million.json        # and as JSON

Ranks are gloo processes on this machine, one head, zigzag shards. A rank makes its own shard and no
other. Rates count the products of visible query-key pairs (forward 4 head_dim per pair, backward
2.5 times that); the peak is that of a register-only loop on all ranks at once, the larger of before
and after. Memory is the most that was resident, Python and torch included.

The progress is an *estimate*: elapsed time against the time of a sixteenth of the length, scaled by
the visible pairs. The call is a few long kernels without a place to report from, and cutting its
queries into slices would send all keys again for each. 100% is printed when the call has returned.

Sampled rows are computed again in float64 and held to a bound on what may be rounded away, see
rows.py; the exit code is 1 if any exceeds it.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import ring_attention as ra
from ring_attention import ops, trace
from rows import DTYPES, INPUTS, Check, Oracle, Problem

SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
DIRECTIONS = {"forward": 4.0, "backward": 10.0}  # products and sums per pair and dimension


@contextmanager
def progress(name: str, expected_s: float) -> Iterator[None]:
    """Rank 0 shows elapsed against expected seconds; nothing if none are expected."""
    if dist.get_rank() or not expected_s:
        yield
        return
    returned, start_s, terminal = threading.Event(), time.monotonic(), sys.stdout.isatty()

    def show() -> None:
        tenths = 0
        while not returned.wait(1.0):
            elapsed_s = time.monotonic() - start_s
            share = min(elapsed_s / expected_s, 0.99)
            text = f"{name:8} {share:4.0%} (estimated: {elapsed_s:.0f} of about {expected_s:.0f} s)"
            if terminal:
                print(f"\r[{'#' * int(30 * share):30}] {text}", end="", flush=True)
            elif int(10 * share) > tenths:
                tenths = int(10 * share)
                print(text, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        returned.set()
        thread.join()
        if terminal:
            print(f"\r{'':100}\r", end="", flush=True)
    took = f"{name:8} 100% (returned after {time.monotonic() - start_s:.1f} s)"
    print(f"[{'#' * 30}] {took}" if terminal else took, flush=True)


def timed(run: Callable[[], None]) -> dict[str, float]:
    """Seconds until all ranks are done, and those this one spent waiting for the ring."""
    dist.barrier()
    start_s = time.perf_counter()
    with trace.record() as events:
        run()
    waiting_s = sum(event.end_s - event.start_s for event in events if event.name == "wait")
    dist.barrier()
    return {"seconds": time.perf_counter() - start_s, "waiting_s": waiting_s}


def resident_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attend(
    problem: Problem, expected_s: dict[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """This rank's inputs and results, without B and H, and what the calls took."""
    group = dist.group.WORLD
    names = INPUTS if problem.backward else INPUTS[:3]
    inputs = {name: problem.shard(name, dist.get_rank()) for name in names}
    q, k, v = (inputs[name].requires_grad_(problem.backward) for name in INPUTS[:3])
    plan = ra.plan(ra.Causal(), problem.layout, group=group)
    ra.agree(plan, group, q, k, v)
    results: dict[str, Tensor] = {}

    def forward() -> None:
        with progress("forward", expected_s.get("forward", 0.0)):
            out, lse = ra.attention(q, k, v, plan=plan, group=group, return_lse=True)
        results.update(out=out, lse=lse)

    def backward() -> None:
        with progress("backward", expected_s.get("backward", 0.0)):
            dq, dk, dv = torch.autograd.grad(results["out"], (q, k, v), inputs["dout"])
        results.update(dq=dq, dk=dk, dv=dv)

    took: dict[str, Any] = {"before_bytes": resident_bytes(), "forward": timed(forward)}
    if problem.backward:
        took["backward"] = timed(backward)
    took["peak_bytes"] = resident_bytes()
    inputs, results = ({n: x.detach()[0, 0] for n, x in xs.items()} for xs in (inputs, results))
    return inputs, results, took


def expectation(problem: Problem) -> dict[str, float]:
    """Seconds per direction as a sixteenth of the length has it; the second run, which is warm."""
    small = replace(problem, tokens=max(problem.tokens // 16, min(problem.tokens, 4096)))
    took = [attend(small, {})[2] for _ in range(2)][1]
    factor = problem.pairs / small.pairs
    return {name: factor * took[name]["seconds"] for name in DIRECTIONS if name in took}


def peak(problem: Problem) -> float:
    """This rank's rate with all others at it."""
    dist.barrier()
    return ops.peak_flops(DTYPES[problem.dtype], 0.3)


def serve(rank: int, store: str, problem: Problem) -> None:
    torch.set_num_threads(1)
    size = problem.ranks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    expected_s = expectation(problem)
    before = peak(problem)
    inputs, results, took = attend(problem, expected_s)
    took["peak_flops"] = max(before, peak(problem))
    if rank == 0:
        print(f"checking {len(problem.sampled())} rows in float64 ...", flush=True)
    took["checks"] = Oracle(problem, inputs, results).checks()
    everyone: list[Any] = [None] * problem.ranks
    dist.all_gather_object(everyone, took)
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(summary(problem, expected_s, everyone)))
    dist.barrier()
    dist.destroy_process_group()


def summary(problem: Problem, expected_s: dict[str, float], ranks: list[Any]) -> dict[str, Any]:
    peak_flops = sum(rank["peak_flops"] for rank in ranks)
    rows = []
    for name in expected_s:
        seconds = max(rank[name]["seconds"] for rank in ranks)
        rate = DIRECTIONS[name] * problem.head_dim * problem.pairs / seconds
        waiting = max(rank[name]["waiting_s"] for rank in ranks) / seconds
        row = {"direction": name, "seconds": seconds, "expected_s": expected_s[name]}
        rows.append(row | {"flops": rate, "of_peak": rate / peak_flops, "waiting": waiting})
    found: list[dict[str, Check]] = [rank["checks"] for rank in ranks]
    worst = {n: max((x[n] for x in found), key=lambda check: check.of_bound) for n in found[0]}

    return {
        **asdict(problem),
        "peak_flops": peak_flops,
        "rows": rows,
        "peak_bytes": [rank["peak_bytes"] for rank in ranks],
        "before_bytes": [rank["before_bytes"] for rank in ranks],
        "scores_bytes": problem.tokens**2 * DTYPES[problem.dtype].itemsize,
        "checks": {name: asdict(check) for name, check in worst.items()},
    }


def report(result: dict[str, Any]) -> None:
    print("\ndirection    seconds   GFLOP/s   of peak   waiting")
    for row in result["rows"]:
        print(
            f"{row['direction']:10}{row['seconds']:10.1f}{row['flops'] / 1e9:10.0f}"
            f"{row['of_peak']:10.1%}{row['waiting']:10.1%}"
        )
    print(
        f"\npeak of all ranks: {result['peak_flops'] / 1e9:.0f} GFLOP/s. Resident memory, at most:"
    )
    for rank, held in enumerate(result["peak_bytes"]):
        more = held - result["before_bytes"][rank]
        print(f"rank {rank}: {held / 1e6:10,.0f} MB, {more / 1e6:,.0f} MB of it since the call")
    print(f"N x N: {result['scores_bytes'] / 1e6:11,.0f} MB for scores in {result['dtype']}")
    print("\nagainst float64       rms   largest error   nearest its bound: error   bound   share")
    for name, check in result["checks"].items():
        nearest = f"{check['error']:25.1e}{check['bound']:8.1e}{check['of_bound']:8.1%}"
        verdict = "" if check["of_bound"] <= 1 else "   EXCEEDED"
        print(f"{name:15}{check['rms']:10.1e}{check['largest']:16.1e}{nearest}{verdict}")


def tokens(text: str) -> int:
    number, factor = text, 1
    if text[-1:].upper() in SUFFIXES:
        number, factor = text[:-1], SUFFIXES[text[-1].upper()]
    if not (number.isascii() and number.isdigit() and int(number)):
        raise argparse.ArgumentTypeError(f"expected a count such as 1M, 64K or 50000, got {text!r}")
    return int(number) * factor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=tokens, default=1 << 20, help="K = 2^10, M = 2^20 (1M)")
    parser.add_argument("--ranks", type=int, default=2, help="ring size (2)")
    parser.add_argument("--head-dim", type=int, default=64, help="16 to 256 in steps of 8 (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backward", action="store_true", help="compute the gradients too")
    parser.add_argument("--samples", type=int, default=64, help="rows to check, at least (64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    if min(args.ranks, args.samples) < 1 or args.tokens < 2 * args.ranks:
        parser.error("expected --ranks and --samples of at least 1, and two --tokens per rank")
    if args.head_dim not in range(16, 257, 8):
        parser.error(f"expected --head-dim from 16 to 256 in steps of 8, got {args.head_dim}")
    options = {name: value for name, value in vars(args).items() if name != "json"}
    problem = Problem(**options)
    print(
        f"{platform.machine()}, torch {torch.__version__}, kernels: {ra.isa_name()}, "
        f"{args.tokens:,} tokens, {args.dtype}, D={args.head_dim}, {args.ranks} ranks of one thread"
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (f"{folder}/store", problem), nprocs=args.ranks)
        result = json.loads(Path(f"{folder}/store.json").read_text())
    report(result)
    if args.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "isa": ra.isa_name()}
        args.json.write_text(json.dumps(about | result, indent=1))
    sys.exit(any(not check["of_bound"] <= 1 for check in result["checks"].values()))


if __name__ == "__main__":
    main()
