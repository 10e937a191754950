# SPDX-License-Identifier: BSD-3-Clause
"""The block kernels against torch's attention and against the machine's peak.

    python benchmarks/kernel.py                                     # the main table
    python benchmarks/kernel.py --device cuda --length 16384 --heads 16 --sdpa flash
    python benchmarks/kernel.py --case full,softcap,gqa,sinks --head-dim 64
    python benchmarks/kernel.py --case short64,short256,short1024 --direction forward
    python benchmarks/kernel.py --case decode1,decode16 --direction forward
    python benchmarks/kernel.py --case bshd,v128,peaked,rising --head-dim 64
    python benchmarks/kernel.py --case full --head-dim 32,40,48 --no-torch --clock cpu --threads 1

Every round runs the peak loop (on as many threads as the kernel), our kernel and torch's one after
the other, so that all three see the same machine. Useful rates count the products of visible
query-key pairs (forward 4 head_dim per pair, backward 2.5 times that), touched rates those of all
64 x 64 tiles with a visible pair. Printed are the medians of ours and of torch's, the largest peak,
ours (touched) as a share of it: the median, and the best round; and the median over the rounds of
torch's time divided by ours. Masks and the like also run beside the full mask: the column is the
median of the ratios of their touched rates. Decoding is bound by memory: its last columns are GB/s
of K and V, and the share of what reading memory reaches in the same rounds.

--clock cpu counts the time that the calling thread ran, for machines that other work shares: what
it was held up by is left out, what it lost of caches and memory is not. One thread only.

RING_ATTENTION_CPU chooses the instruction set, as everywhere. On CUDA the peak is that of a large
product of matrices (for float32 without TF32), and "threads" says 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernel_cases import SDPA, Problem, case_named, tiles_touched
from ring_attention import ops


@dataclass
class Row:
    """One line of the table; rates in GFLOP/s."""

    threads: int
    dtype: str
    head_dim: int
    case: str
    direction: str
    useful: float
    touched: float
    torch: float | None
    speedup: float | None
    peak: float
    of_peak: float
    best_of_peak: float
    of_full: float | None = None  # touched rate / the full mask's
    bandwidth: float | None = None  # GB/s of K and V
    of_bandwidth: float | None = None


@dataclass(frozen=True)
class Round:
    """What ran one after the other: the peak in FLOP/s, seconds per call, bytes per second."""

    peak: float
    ours_s: float
    torch_s: float | None
    full_s: float | None
    bandwidth: float | None


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def timed(
    run: Callable[[], object], repeats: int = 1, device: str = "cpu", clock: str = "wall"
) -> float:
    """Seconds per run."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = CLOCKS[clock]()
    for _ in range(repeats):
        run()
    wait()
    return (CLOCKS[clock]() - start) / repeats


def peak_flops(dtype: torch.dtype, device: str) -> float:
    """What the kernels are measured against, in FLOP/s."""
    if not device.startswith("cuda"):
        return ops.peak_flops(dtype, 0.03)
    size = 8192 if dtype != torch.float32 else 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / timed(lambda: a @ b, 5, device)


def read_bandwidth(memory: Tensor, clock: str) -> float:
    """Bytes per second of a reduction over memory that no cache holds."""
    return memory.nbytes / timed(memory.sum, 1, str(memory.device), clock)


def measure(args: argparse.Namespace, dtype: torch.dtype, head_dim: int, name: str) -> list[Row]:
    def problem_of(name: str) -> Problem:
        case = case_named(name, args.length, args.heads)
        return Problem.make(name, case, dtype, head_dim, args.device)

    problem = problem_of(name)
    ours = problem.ours()
    theirs = problem.torchs(ours["forward"], args.sdpa) if args.torch else {}
    touched = tiles_touched(problem.begin.cpu(), problem.end.cpu(), problem.case.k_len)
    decoding, short = name.startswith("decode"), name.startswith("short")
    full = None if decoding or short or name == "full" else problem_of("full")
    fulls = full.ours() if full else {}
    memory = torch.ones(1 << 27 if decoding else 1, device=args.device)
    rest = (args.device, args.clock)
    rows = []
    for direction in args.direction:
        work = problem.flops(direction, touched)
        # Short problems are repeated, so that a round is long enough to time.
        repeats = max(1, round(2e9 / problem.flops("forward", touched)))
        rounds = []
        for _ in range(args.rounds):
            rounds.append(
                Round(
                    peak=peak_flops(dtype, args.device),
                    ours_s=timed(ours[direction], repeats, *rest),
                    torch_s=timed(theirs[direction], repeats, *rest)
                    if direction in theirs
                    else None,
                    full_s=timed(fulls[direction], 1, *rest) if fulls else None,
                    bandwidth=read_bandwidth(memory, args.clock) if decoding else None,
                )
            )
        peak = max(r.peak for r in rounds)
        median = statistics.median(r.ours_s for r in rounds)
        row = Row(
            threads=torch.get_num_threads(),
            dtype=str(dtype).removeprefix("torch."),
            head_dim=head_dim,
            case=name,
            direction=direction,
            useful=round(problem.flops(direction, problem.visible) / median / 1e9, 1),
            touched=round(work / median / 1e9, 1),
            torch=None,
            speedup=None,
            peak=round(peak / 1e9, 1),
            of_peak=round(work / median / peak, 3),
            best_of_peak=round(work / min(r.ours_s for r in rounds) / peak, 3),
        )
        if torchs := [(r.torch_s, r.ours_s) for r in rounds if r.torch_s is not None]:
            useful = problem.flops(direction, problem.visible) / 1e9
            row.torch = round(useful / statistics.median(torch_s for torch_s, _ in torchs), 1)
            row.speedup = round(
                statistics.median(torch_s / ours_s for torch_s, ours_s in torchs), 2
            )
        if full is not None:
            work_of_full = full.flops(direction, full.visible)
            row.of_full = round(
                statistics.median(
                    work / r.ours_s * r.full_s / work_of_full for r in rounds if r.full_s
                ),
                3,
            )
        if decoding and direction == "forward":
            nbytes = problem.k.nbytes + problem.v.nbytes
            row.bandwidth = round(nbytes / median / 1e9, 1)
            row.of_bandwidth = round(nbytes / median / max(r.bandwidth or 0 for r in rounds), 3)
        rows.append(row)
    return rows


def line(row: Row) -> str:
    torchs = (
        f"{row.torch:7.1f} {row.speedup:8.2f}x" if row.torch is not None else f"{'-':>7} {'-':>9}"
    )
    full = "" if row.of_full is None else f"{row.of_full:8.0%}"
    memory = "" if row.bandwidth is None else f"  {row.bandwidth:5.1f} GB/s  {row.of_bandwidth:.0%}"
    return (
        f"{row.threads:<8} {row.dtype:<9} {row.head_dim:<4} {row.case:<10} {row.direction:<9} "
        f"{row.useful:7.1f} {row.touched:8.1f}  {torchs} {row.peak:8.1f} {row.of_peak:8.0%} "
        f"{row.best_of_peak:6.0%}{full}{memory}"
    )


def processor(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def arguments() -> argparse.Namespace:
    def comma(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=comma, default=["1", "2"])
    parser.add_argument("--dtype", type=comma, default=["bfloat16", "float32"])
    parser.add_argument("--head-dim", type=comma, default=["64", "128"])
    parser.add_argument("--case", type=comma, default=["full", "causal", "window", "documents"])
    parser.add_argument("--direction", type=comma, default=["forward", "backward"])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--sdpa", choices=SDPA, default="any", help="torch's backend (default any)")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="ours alone")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    if args.device.startswith("cuda"):
        if not torch.cuda.is_available():
            parser.error("expected a GPU for --device cuda, torch sees none")
        args.threads = ["1"]
    if not args.torch and args.sdpa != "any":
        parser.error(f"expected no --sdpa with --no-torch, which leaves torch out, got {args.sdpa}")
    if args.clock == "cpu" and (args.threads != ["1"] or args.device != "cpu"):
        parser.error("expected --threads 1 on the CPU with --clock cpu, which sees one thread")
    return args


def main() -> None:
    args = arguments()
    print(
        f"{processor(args.device)}, {ops.isa_name()}, torch {torch.__version__}, "
        f"B=1 H={args.heads} N={args.length}, {args.rounds} rounds, GFLOP/s\n"
    )
    print(
        "threads  dtype     D    case       direction  useful  touched    torch  speed-up "
        "    peak  of peak   best of full"
    )
    rows: list[Row] = []
    for threads in args.threads:
        torch.set_num_threads(int(threads))
        for dtype in args.dtype:
            for head_dim in args.head_dim:
                for name in args.case:
                    for row in measure(args, getattr(torch, dtype), int(head_dim), name):
                        rows.append(row)
                        print(line(row), flush=True)
    if args.json:
        machine = {
            "processor": processor(args.device),
            "isa": ops.isa_name(),
            "torch": torch.__version__,
        }
        args.json.write_text(
            json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
