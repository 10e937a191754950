# SPDX-License-Identifier: BSD-3-Clause
"""How good are the tests? Changes single instructions of the CUDA kernels and sees who notices.

    make mutants [ARGS="--mutants 50 forward-bf16 atomic-bf16"]

Each kernel is first run as compiled, by the cases of mutant_cases.py: they must be right, and what
they execute is counted. Mutants are then drawn, with a fixed seed, from the instructions executed;
those never executed are listed, for nothing is known about them. A mutant is killed by the first
case that ends in a fault of the virtual GPU or in wrong values; or, if it passes them all, by
having executed more than the kernel does: much of these kernels only saves work. Cases that do not
execute its instruction are not tried, for they cannot tell it from the original.
"""

import argparse
import ctypes
import fnmatch
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SMALL = {"RING_ATTENTION_PTXVM_SMEM": "99"}
ATOMIC = {"RING_ATTENTION_CUDA_BACKWARD": "atomic"}
# A block that executes so many times what the kernel did as compiled, all blocks together, will not
# end. And never fewer: a kernel may have very little to do.
PATIENCE, LEAST_PATIENCE = 4, 200_000
# Of the kernels that do little for a row but find it, a part is division by 64-bit numbers, whose
# way for numbers beyond 32 bits needs tensors that no test has.
DIVIDING = 80.0


@dataclass
class Target:
    """A kernel, by its C++ name without namespaces, and what drives it."""

    kernel: str  # * stands for anything
    cases: str  # of mutant_cases
    dtype: str = "bfloat16"
    dims: tuple[int, int] = (64, 64)
    softcap: float = 0.0
    rows: int = 1 << 20
    environment: dict[str, str] = field(default_factory=dict)
    # Killed, in percent. Of the others most are equal to the kernel: README.md has the kinds.
    least: float = 95.0


def forward(element: str, dims: str, shape: str, softcap: bool = False) -> str:
    tile = f"ForwardTile<{dims}, ForwardShape{{{shape}, *}}>"
    return f"forward_kernel<{element}, {tile}, {str(softcap).lower()}>"


TARGETS = {
    "forward-bf16": Target(forward("BFloat16", "64, 64", "4, 32"), "forward"),
    "forward-few": Target(forward("BFloat16", "64, 64", "2, 16"), "forward", rows=32),
    "forward-f16": Target(forward("Float16", "64, 64", "4, 32"), "forward", "float16"),
    "forward-softcap": Target(forward("BFloat16", "64, 64", "4, 32", True), "forward", softcap=3.0),
    "forward-narrow": Target(
        forward("BFloat16", "192, 128", "4, 16"), "forward", dims=(192, 128), environment=SMALL
    ),
    "forward-fp32": Target("forward_fp32_kernel<Fp32Tile<64>, false>", "forward", "float32"),
    "join-parts": Target("join_parts_kernel<BFloat16>", "forward", dims=(64, 256), least=DIVIDING),
    "dq-bf16": Target("backward_dq<BFloat16, HeadDims<64, 64>, false>", "backward"),
    "dkdv-bf16": Target("backward_keys<BFloat16, HeadDims<64, 64>, false, 3>", "backward"),
    "dq-f16": Target("backward_dq<Float16, HeadDims<64, 64>, false>", "backward", "float16"),
    "dkdv-f16": Target("backward_keys<Float16, HeadDims<64, 64>, false, 3>", "backward", "float16"),
    "dq-fp32": Target("backward_dq<Float32, HeadDims<64, 64>, false>", "backward", "float32"),
    "dkdv-fp32": Target(
        "backward_keys<Float32, HeadDims<64, 64>, false, 3>", "backward", "float32"
    ),
    "atomic-bf16": Target(
        "backward_keys<BFloat16, HeadDims<64, 64>, false, 7>", "backward", environment=ATOMIC
    ),
    "row-stats": Target("row_stats", "backward", "float32", least=DIVIDING),
    "key-ranges": Target("key_ranges", "backward", least=DIVIDING),
    "add-parts": Target("add_parts", "backward", least=DIVIDING),
    "combine": Target("combine_kernel", "row", "float32", least=DIVIDING),
    "finish": Target("finish_kernel<BFloat16>", "row", least=DIVIDING),
    "delta": Target("delta_kernel<BFloat16>", "row", least=DIVIDING),
    "sinks": Target("sink_gradient_kernel", "row", "float32", least=DIVIDING),
}


@dataclass
class Instruction:
    executed: int  # by the last case
    place: str
    text: str
    reached: bool = False  # by any


@dataclass
class Result:
    instructions: int = 0
    executed: int = 0
    killed: dict[str, int] = field(default_factory=lambda: {"fault": 0, "values": 0, "work": 0})
    survivors: list[str] = field(default_factory=list)
    unexecuted: list[str] = field(default_factory=list)
    cases: int = 0
    seconds: float = 0.0


class VirtualGpu:
    """The functions of mutation.h, for one kernel."""

    def __init__(self, kernel: str) -> None:
        from ring_attention import ops

        if ops.isa_name() != "ptx-sm80":
            raise SystemExit("mutants: expected the build of `make vm`; run `make mutants`")
        library = next(Path(ops.__file__).parent.glob("_C.*so"))
        self.library = ctypes.CDLL(str(library))  # in memory already: the same one
        for name in ("kernels", "instructions", "mutate"):
            getattr(self.library, f"ptxvm_{name}").restype = ctypes.c_char_p
        self.library.ptxvm_executed.restype = ctypes.c_uint64
        lines = self.library.ptxvm_kernels().decode().splitlines()
        names = {}
        for mangled, name in (line.split("\t") for line in lines):
            names[re.sub(r"\(anonymous namespace\)::|\b\w+::|^void |\(.*", "", name)] = mangled
        matching = fnmatch.filter(names, kernel.replace("[", "[[]"))
        if len(matching) != 1:
            raise SystemExit(f"mutants: expected one kernel {kernel}, found {sorted(names)}")
        self.kernel = names[matching[0]].encode()

    def instructions(self) -> list[Instruction]:
        lines = self.library.ptxvm_instructions(self.kernel).decode().splitlines()
        found = [
            Instruction(int(n), place, text) for n, place, text in (x.split("\t") for x in lines)
        ]
        for one in found:
            one.place = re.sub(r"[^ ()]*/(?=csrc/)|(?<=/)\w+/\.\./", "", one.place)
        return found

    def mutate(self, instruction: int, seed: int) -> str:
        words = (ctypes.c_uint64(instruction), ctypes.c_uint64(seed))
        return self.library.ptxvm_mutate(self.kernel, *words).decode()

    def restore(self) -> None:
        self.library.ptxvm_restore(self.kernel)

    def executed(self) -> int:
        """By the kernel as it is now, since it became so."""
        return self.library.ptxvm_executed(self.kernel)

    def limit(self, instructions: int) -> None:
        self.library.ptxvm_limit_instructions(ctypes.c_uint64(instructions))


def fate(case: Any) -> str:
    """Of a mutant at the hands of a case: "fault", "values" or "" if it survives."""
    try:
        return "values" if case.wrong(case.run()) else ""
    except RuntimeError as problem:
        if "ptxvm" not in str(problem):
            raise
        return "fault"


def examine(target: Target, mutants: int, seed: int) -> Result:
    """Runs the cases, then the mutants."""
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent)]
    import mutant_cases
    import mutant_problems
    import torch

    torch.manual_seed(seed)
    start = time.perf_counter()
    gpu = VirtualGpu(target.kernel)
    make = getattr(mutant_cases, f"{target.cases}_cases")
    counted = []
    dtype = getattr(torch, target.dtype)
    drive = mutant_problems.Drive(dtype, target.dims, target.softcap, target.rows)
    for case in make(drive):
        gpu.restore()
        if how := fate(case):
            raise SystemExit(f"mutants: {target.kernel}, as compiled, fails {case.name}: {how}")
        counts = [one.executed for one in gpu.instructions()]
        counted.append((sum(counts), counts, case))
    counted.sort(key=lambda entry: entry[0])

    found = gpu.instructions()
    for i, one in enumerate(found):
        one.reached = any(counts[i] for _, counts, _ in counted)
    reached = [i for i, one in enumerate(found) if one.reached]
    result = Result(len(found), len(reached), cases=len(counted))
    places = Counter(one.place for one in found if not one.reached)
    result.unexecuted = [f"{count} at {place}" for place, count in places.items()]
    draw = random.Random(f"{seed} {target.kernel}")
    tried: set[tuple[int, str]] = set()
    while len(tried) < mutants:
        i = draw.choice(reached)
        mutant = gpu.mutate(i, draw.getrandbits(63))
        if not mutant or (i, mutant) in tried:
            continue
        tried.add((i, mutant))
        how, idle = "", True
        for total, counts, case in counted:
            if counts[i] and not how:
                gpu.limit(max(PATIENCE * total, LEAST_PATIENCE))
                before = gpu.executed()
                how = fate(case)
                idle &= gpu.executed() - before <= total
        if how := how or ("" if idle else "work"):
            result.killed[how] += 1
        else:
            result.survivors.append(f"{found[i].text}  ->  {mutant}  at {found[i].place}")
    result.seconds = time.perf_counter() - start
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--mutants", type=int, default=200, help="of each kernel (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="what they are drawn by (%(default)s)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.kernels) - set(TARGETS):
        parser.error(f"expected kernels of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    names = arguments.kernels or list(TARGETS)
    if arguments.one:
        print(json.dumps(asdict(examine(TARGETS[names[0]], arguments.mutants, arguments.seed))))
        return

    columns = ["instructions", "executed", "mutants", "fault", "values", "work", "survived"]
    columns.append("killed")
    print(f"{'kernel':15}", *columns, "seconds", sep="  ")
    weak = []
    for name in names:
        # A process each: what the environment says is read once.
        options = ["--one", "--mutants", str(arguments.mutants), "--seed", str(arguments.seed)]
        run = subprocess.run(
            [sys.executable, __file__, name, *options],
            env={**os.environ, **TARGETS[name].environment}, stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
        if run.returncode != 0:
            raise SystemExit(f"mutants: {name} ended with {run.returncode}")
        r = json.loads(run.stdout)
        dead, total = sum(r["killed"].values()), arguments.mutants
        share, score = f"{r['executed'] / r['instructions']:.1%}", f"{dead / total:.1%}"
        row = (r["instructions"], share, total, *r["killed"].values(), total - dead, score)
        cells = (f"{x:>{len(column)}}" for x, column in zip(row, columns, strict=True))
        print(f"{name:15}", *cells, f"{r['seconds']:7.0f}", sep="  ")
        for line in r["survivors"]:
            print(f"    survived: {line}")
        for line in r["unexecuted"]:
            print(f"    never executed: {line}")
        sys.stdout.flush()
        if 100 * dead < TARGETS[name].least * total:
            weak.append(f"{name} ({TARGETS[name].least:.0f}% expected)")
    if weak:
        raise SystemExit(f"mutants: too few killed of {', '.join(weak)}")


if __name__ == "__main__":
    main()
