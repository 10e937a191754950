# SPDX-License-Identifier: BSD-3-Clause
"""How good are the tests? Changes single instructions of the CUDA kernels and sees who notices.

    make mutants [ARGS="--mutants 50 forward-bf16 atomic-bf16"]

Each kernel is first run as compiled, by the cases of one of the files mutant_*.py: they must be
right, and what they execute is counted. Mutants are then drawn, with a fixed seed, from the
instructions executed; those never executed are listed, for nothing is known about them. A mutant is
killed by the first case that ends in a fault of the virtual GPU or in wrong values; or, if it
passes them all, by having executed more than the kernel does, itself or by those that read what it
wrote: much of these kernels only saves work. Cases that do not execute its instruction are not
tried, for they cannot tell it from the original. Fails if of a kernel fewer are killed than are to
be.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from virtual_gpu import VirtualGpu, same_mutants, without_consequence

SMALL = {"RING_ATTENTION_PTXVM_SMEM": "99"}
HOPPER = {"RING_ATTENTION_CPU": "ptx-sm90"}
ATOMIC = {"RING_ATTENTION_CUDA_BACKWARD": "atomic"}
# A block that executes so many times what the kernel did as compiled, all blocks together, will not
# end. And never fewer: a kernel may have very little to do.
PATIENCE, LEAST_PATIENCE = 4, 200_000
# In percent of the mutants of a forward or backward kernel, and of one that does little for a row
# but find it. Of those that survive most are equal to the kernel: README.md has the kinds.
TILES, ROWS = 95.0, 85.0
# A score of fewer mutants says little.
LEAST_MUTANTS = 60


@dataclass
class Target:
    """A kernel, by its C++ name without namespaces, and what drives it."""

    kernel: str  # * stands for anything
    cases: str  # mutant_<these>.py
    dtype: str = "bfloat16"
    dims: tuple[int, int] = (64, 64)
    softcap: float = 0.0
    rows: int = 1 << 20
    environment: dict[str, str] = field(default_factory=dict)
    least: float = TILES  # killed, in percent
    readers: Sequence[str] = ()  # kernels whose work depends on what it writes


def forward(element: str, dims: str, shape: str, softcap: bool = False) -> str:
    tile = f"ForwardTile<{dims}, ForwardShape{{{shape}, *}}>"
    return f"forward_kernel<{element}, {tile}, {str(softcap).lower()}>"


TARGETS = {
    "forward-bf16": Target(forward("BFloat16", "64, 64", "4, 32"), "forward"),
    "forward-few": Target(forward("BFloat16", "64, 64", "2, 16"), "forward", rows=32),
    "forward-hopper": Target(
        forward("BFloat16", "64, 64", "192, 128"), "forward", environment=HOPPER
    ),
    "forward-f16": Target(forward("Float16", "64, 64", "4, 32"), "forward", "float16"),
    "forward-softcap": Target(forward("BFloat16", "64, 64", "4, 32", True), "forward", softcap=3.0),
    "forward-narrow": Target(
        forward("BFloat16", "192, 128", "4, 16"), "forward", dims=(192, 128), environment=SMALL
    ),
    "forward-fp32": Target("forward_fp32_kernel<Fp32Tile<64>, false>", "forward", "float32"),
    "join-parts": Target(
        "join_parts_kernel<BFloat16>", "forward", dims=(64, 256), rows=8, least=ROWS
    ),
    "dq-bf16": Target("backward_dq<BFloat16, HeadDims<64, 64>, true>", "backward"),
    "dkdv-bf16": Target("backward_keys<BFloat16, HeadDims<64, 64>, true, 3>", "backward"),
    "dq-f16": Target("backward_dq<Float16, HeadDims<64, 64>, true>", "backward", "float16"),
    "dkdv-f16": Target("backward_keys<Float16, HeadDims<64, 64>, true, 3>", "backward", "float16"),
    "dq-fp32": Target("backward_dq<Float32, HeadDims<64, 64>, false>", "backward", "float32"),
    "dkdv-fp32": Target(
        "backward_keys<Float32, HeadDims<64, 64>, false, 3>", "backward", "float32"
    ),
    "atomic-bf16": Target(
        "backward_keys<BFloat16, HeadDims<64, 64>, true, 7>", "backward", environment=ATOMIC
    ),
    "row-stats": Target("row_stats", "backward", "float32", least=ROWS),
    "key-ranges": Target(
        "key_ranges",
        "ranges",
        least=ROWS,
        readers=[
            f"backward_{kernel}"
            for tile in ("BFloat16, HeadDims<64, 64>, true", "Float32, HeadDims<128, 128>, false")
            for kernel in (f"dq<{tile}>", f"keys<{tile}, 3>")
        ],
    ),
    "add-parts": Target("add_parts", "backward", least=ROWS),
    "combine": Target("combine_kernel", "rows", "float32", least=ROWS),
    "finish": Target("finish_kernel<BFloat16>", "rows", least=ROWS),
    "delta": Target("delta_kernel<BFloat16>", "rows", least=ROWS),
    "sinks": Target("sink_gradient_kernel", "rows", "float32", least=ROWS),
}


@dataclass
class Result:
    instructions: int
    executed: int
    mutants: int = 0
    killed: dict[str, int] = field(default_factory=lambda: {"fault": 0, "values": 0, "work": 0})
    survivors: list[str] = field(default_factory=list)
    unexecuted: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Counted:
    """A case, and how often the kernel as compiled executes each of its instructions there."""

    case: Any
    counts: list[int]
    total: int
    work: int  # with that of the readers


def fate(case: Any) -> str:
    """Of a mutant at the hands of a case: "fault", "values" or "" if it survives."""
    try:
        return "values" if case.wrong(case.run()) else ""
    except RuntimeError as problem:
        if "ptxvm" not in str(problem):
            raise
        return "fault"


def count(gpu: VirtualGpu, target: Target) -> list[Counted]:
    """The target's cases that execute its kernel, the cheapest first."""
    import mutant_problems
    import torch

    dtype = getattr(torch, target.dtype)
    drive = mutant_problems.Drive(dtype, target.dims, target.softcap, target.rows)
    counted = []
    for case in importlib.import_module(f"mutant_{target.cases}").cases(drive):
        gpu.restore()
        before = gpu.executed()
        if how := fate(case):
            raise SystemExit(f"mutants: {target.kernel}, as compiled, fails {case.name}: {how}")
        counts = [one.executed for one in gpu.instructions()]
        if any(counts):
            counted.append(Counted(case, counts, sum(counts), gpu.executed() - before))
    return sorted(counted, key=lambda x: x.total)


def killed_by(gpu: VirtualGpu, instruction: int, cases: list[Counted]) -> str:
    """What ends the mutant that the kernel is: "fault", "values", "work", or "" if nothing does."""
    idle = True
    for x in cases:
        if x.counts[instruction]:
            gpu.limit(max(PATIENCE * x.total, LEAST_PATIENCE))
            before = gpu.executed()
            if how := fate(x.case):
                return how
            idle &= gpu.executed() - before <= x.work
    return "" if idle else "work"


def examine(target: Target, mutants: int, seed: int, seconds: float) -> Result:
    """Runs the cases, then the mutants: so many, or what can be done in so many seconds."""
    import torch

    torch.manual_seed(seed)
    start = time.perf_counter()
    gpu = VirtualGpu(target.kernel, target.readers)
    cases = count(gpu, target)
    code = gpu.instructions()
    executed = {i for i in range(len(code)) if any(x.counts[i] for x in cases)}
    result = Result(len(code), len(executed))
    places = Counter(one.place for i, one in enumerate(code) if i not in executed)
    result.unexecuted = [f"{count} at {place}" for place, count in places.items()]
    worthwhile = sorted(executed - without_consequence(code))
    same = same_mutants(code)
    draw = random.Random(f"{seed} {target.kernel}")
    tried: set[tuple[int, str]] = set()
    while len(tried) < mutants and time.perf_counter() - start < seconds:
        i = draw.choice(worthwhile)
        mutant = gpu.mutate(i, draw.getrandbits(63))
        if not mutant or (i, mutant) in tried or same(i, mutant):
            continue
        tried.add((i, mutant))
        if how := killed_by(gpu, i, cases):
            result.killed[how] += 1
        else:
            result.survivors.append(f"{code[i].text}  ->  {mutant}  at {code[i].place}")
    result.mutants = len(tried)
    result.seconds = time.perf_counter() - start
    return result


def examined_apart(name: str, arguments: argparse.Namespace, seconds: float) -> Result | None:
    """In a process of its own: what the environment says is read once. None: it has said why."""
    options = ["--mutants", str(arguments.mutants), "--seed", str(arguments.seed)]
    run = subprocess.run(
        [sys.executable, __file__, name, *options, "--seconds", str(seconds)],
        env={**os.environ, **TARGETS[name].environment}, stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    return None if run.returncode != 0 else Result(**json.loads(run.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--mutants", type=int, default=200, help="of each kernel (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="what they are drawn by (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=60, help="for all kernels, in equal parts (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.kernels) - set(TARGETS):
        parser.error(f"expected kernels of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    names = arguments.kernels or list(TARGETS)
    if arguments.seconds:
        one = examine(TARGETS[names[0]], arguments.mutants, arguments.seed, arguments.seconds)
        print(json.dumps(asdict(one)))
        return

    columns = ["instructions", "executed", "mutants", "fault", "values", "work", "survived"]
    columns += ["killed", "gate"]
    print(f"{'kernel':15}", *columns, "seconds", sep="  ")
    weak = []
    end = time.perf_counter() + 60 * arguments.minutes
    for i, name in enumerate(names):
        r = examined_apart(name, arguments, (end - time.perf_counter()) / (len(names) - i))
        if r is None:
            weak.append(f"{name}: no score")
            continue
        dead, least = sum(r.killed.values()), TARGETS[name].least
        share, score = r.executed / r.instructions, dead / max(r.mutants, 1)
        row = (r.instructions, f"{share:.1%}", r.mutants, *r.killed.values(), r.mutants - dead)
        row += (f"{score:.1%}", f"{least:.0f}%")
        cells = (f"{x:>{len(column)}}" for x, column in zip(row, columns, strict=True))
        print(f"{name:15}", *cells, f"{r.seconds:7.0f}", sep="  ")
        for line in r.survivors:
            print(f"    survived: {line}")
        for line in r.unexecuted:
            print(f"    never executed: {line}")
        sys.stdout.flush()
        if r.mutants < min(LEAST_MUTANTS, arguments.mutants):
            weak.append(f"{name}: only {r.mutants} mutants in its time, no score")
        elif 100 * score < least:
            weak.append(f"{name}: {score:.1%} killed, expected {least:.0f}%")
    print(f"mutants: {len(names) - len(weak)} of {len(names)} kernels pass their gate")
    if weak:
        raise SystemExit("\n".join(weak))


if __name__ == "__main__":
    main()
