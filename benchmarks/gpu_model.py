# SPDX-License-Identifier: BSD-3-Clause
"""Predicts how near the CUDA kernels come to a GPU's peak, from their machine code alone.

For every kernel of 16-bit inputs: the loop that multiplies, and in it the path that a full tile
takes; what its instructions occupy of each unit of a multiprocessor; and from that two shares of
the tensor cores' peak:

    serial   a warp's products and its softmax take turns
    overlap  the busiest unit is the bound, everything else hides behind it

The same model of FlashAttention-2's kernels as torch ships them, of which figures are published,
is the check; benchmarks/README.md has what an H100 made of both: 14% to 30% less than serial, by
atomics 47%, and two kernels ranked wrongly. Memory, waits at barriers and dQ's atomics are not
modelled.

    make cuda
    python benchmarks/gpu_model.py
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MMA_FLOPS = 4096  # of one m16n8k16


@dataclass(frozen=True)
class Gpu:
    """Cycles that a warp's instruction occupies a unit of its quarter of a multiprocessor."""

    sass: str
    peak_mma: float  # an m16n8k16 at the peak that the maker states
    mma: float  # as mma.sync reaches it
    fp32: float
    integer: float = 2.0  # 16 lanes
    special: float = 8.0  # 4 lanes
    shared_bytes: float = 32.0  # a quarter of 128 bytes per cycle


GPUS = {
    "A100": Gpu("sm_80", peak_mma=8.0, mma=8.0, fp32=2.0),
    # Only wgmma reaches H100's peak; mma.sync about 63% of it.
    "H100": Gpu("sm_90", peak_mma=4.0, mma=4.0 / 0.63, fp32=1.0),
}
# What its authors state of FlashAttention-2's best case: arXiv 2307.08691 and 2407.08608.
PUBLISHED = {
    ("A100", "forward", 128): "up to 73%",
    ("A100", "backward", 128): "up to 63%",
    ("H100", "forward", 128): "35%",
}

# By unit; what is named nowhere takes an issue slot only.
FP32 = "FFMA FADD FMUL"
INTEGER = (
    "IMAD FMNMX FSETP FSEL ISETP IADD3 LOP3 SHF LEA SEL F2FP PRMT PLOP3 IABS VIADD FMNMX3 IMNMX "
    "MOV P2R R2P VIMNMX CS2R"
)
SPECIAL = "MUFU F2F I2F F2I I2FP"


@dataclass(frozen=True)
class Instruction:
    at: int
    name: str
    guarded: bool
    target: int | None  # of a branch

    @property
    def op(self) -> str:
        return self.name.split(".")[0]

    @property
    def shared_bytes(self) -> int:
        """That a warp moves; without bank conflicts, and a load is taken for a broadcast."""
        if self.op == "LDSM":
            return 128 * int(self.name[-1])
        if self.op in ("LDGSTS", "STS"):
            return 512 if ".128" in self.name else 256 if ".64" in self.name else 128
        return 128 if self.op == "LDS" else 0


Code = list[Instruction]
LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)\s*([^;]*);")


def machine_code(cuobjdump: str, binary: Path, sass: str, kernels: list[str]) -> dict[str, Code]:
    """Of some of a binary's kernels, by mangled names."""
    command = [cuobjdump, "-sass", "-arch", sass, "-fun", ",".join(kernels), str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Code] = {}
    code: Code = []
    for line in listing.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            code = found[function[1]] = []
        elif match := LINE.match(line):
            at, guard, name, rest = match.groups()
            branch = re.search(r"0x([0-9a-f]+)", rest) if name.split(".")[0] == "BRA" else None
            # What depends on a predicate, or on whether lanes have parted, may fall through.
            guarded = bool(guard) or "P" in rest.split("0x")[0] or ".DIV" in name
            target = int(branch[1], 16) if branch else None
            code.append(Instruction(int(at, 16), name, guarded, target))
    return found


def products(code: Code) -> int:
    return sum(i.op == "HMMA" for i in code)


def loops(code: Code) -> list[Code]:
    """Those that multiply; an outer one holds the inner ones."""
    back = [(i.target, i.at) for i in code if i.target is not None and i.target < i.at]
    bodies = [[j for j in code if begin <= j.at <= end] for begin, end in back]
    return [body for body in bodies if products(body)]


def full_tile(body: Code) -> Code:
    """The path through a loop that multiplies and copies most, in the fewest instructions."""
    index = {i.at: n for n, i in enumerate(body)}
    best: list[tuple[int, int, int] | None] = [None] * (len(body) + 1)
    before = [-1] * (len(body) + 1)
    best[0] = (0, 0, 0)
    for n, i in enumerate(body):
        here = best[n]
        if here is None:
            continue
        after = (here[0] + (i.op == "HMMA"), here[1] + (i.op == "LDGSTS"), here[2] - 1)
        following = [n + 1] if i.target is None or i.guarded or n + 1 == len(body) else []
        if i.target is not None and index.get(i.target, 0) > n:
            following.append(index[i.target])
        for m in following:
            reached = best[m]
            if reached is None or after > reached:
                best[m], before[m] = after, n
    path, n = [], len(body)
    while n > 0:
        n = before[n]
        path.append(body[n])
    return path[::-1]


@dataclass(frozen=True)
class Use:
    """Cycles of each unit for one warp and one turn of the loop, as shares of those at peak."""

    instructions: float
    products: float
    tensor: float
    shared: float
    special: float
    arithmetic: float
    issue: float

    @property
    def overlap(self) -> float:
        return 1 / max(self.tensor, self.shared, self.special, self.arithmetic, self.issue)

    @property
    def bound(self) -> str:
        units = ("tensor", "shared", "special", "arithmetic", "issue")
        return max(units, key=lambda unit: float(getattr(self, unit)))

    @property
    def serial(self) -> float:
        return 1 / max(
            max(self.tensor, self.shared) + max(self.special, self.arithmetic), self.issue
        )


def use(code: Code, made: int, gpu: Gpu) -> Use:
    """Of the smallest loop in which a tile makes all its products, `made` in number.

    Where one of them is a loop in that loop (dQ, by atomics), it turns as often as makes it whole.
    """
    inside_out = sorted(loops(code), key=len)
    tile = max(inside_out, key=lambda body: products(full_tile(body)))
    path = full_tile(tile)
    times = [(i, 1.0) for i in path]
    inner = [body for body in inside_out if len(body) < len(tile) and set(body) <= set(tile)]
    if inner:
        turn = full_tile(inner[0])
        passed = int(turn[0] in path)
        turns = (products(path) - passed * products(turn)) / (made - 1) / products(turn)
        times += [(i, turns - passed) for i in turn]

    def count(unit: str) -> float:
        return sum(n for i, n in times if i.op in unit.split())

    peak = count("HMMA") * gpu.peak_mma
    return Use(
        instructions=sum(n for _, n in times),
        products=count("HMMA"),
        tensor=gpu.mma / gpu.peak_mma,
        shared=sum(n * i.shared_bytes for i, n in times) / gpu.shared_bytes / peak,
        special=count(SPECIAL) * gpu.special / peak,
        arithmetic=(count(FP32) * gpu.fp32 + count(INTEGER) * gpu.integer) / peak,
        issue=sum(n for _, n in times) / peak,
    )


# ---- Whose kernels.


@dataclass(frozen=True)
class Way:
    """A way to compute a direction: kernels by name, and how many products each makes.

    Of rows x keys x head_dim each: a forward needs two, a backward five; some are made twice.
    """

    whose: str
    direction: str
    kernels: tuple[tuple[str, int], ...]  # a pattern, {d} is the head dim; products

    def predicted(self, uses: list[Use]) -> tuple[float, float]:
        """Useful products over the time of all: serial, overlap."""
        useful = 2 if self.direction == "forward" else 5
        weights = [made for _, made in self.kernels]
        serial = sum(w / u.serial for w, u in zip(weights, uses, strict=True))
        overlap = sum(w / u.overlap for w, u in zip(weights, uses, strict=True))
        return useful / serial, useful / overlap


ELEM = "INS0_8BFloat16ENS_8HeadDimsILi{d}ELi{d}EEE"
FA2 = r"traitsILi{d}ELi%sE.*bfloat16_tE.*ES3_EE"  # dropout, causal, local, alibi, even, even, ...
WAYS = (
    Way("ours", "forward", ((r"forward_kernelINS0_8BFloat16E.*TileILi{d}ELi{d}E.*EELb0EEEv", 2),)),
    Way(
        "FlashAttention-2",
        "forward",
        (("flash_fwd_kernelI.*" + FA2 % "128" + "(Lb0E){4}(Lb1E){2}(Lb0E){2}EEv", 2),),
    ),
    Way(
        "ours",
        "backward",
        ((rf"backward_dq{ELEM}Lb.EEEv", 3), (rf"backward_keys{ELEM}Lb.ELi3EEEv", 4)),
    ),
    Way("ours, atomic", "backward", ((rf"backward_keys{ELEM}Lb.ELi7EEEv", 5),)),
    Way(
        "FlashAttention-2",
        "backward",
        (("flash_bwd_dq_dk_dv_loop_.*" + FA2 % "(64|128)" + "(Lb0E){4}(Lb1E){2}Lb0EEEv", 5),),
    ),
)


def chosen(pattern: str, dim: int, found: dict[str, Code]) -> Code | None:
    """The kernel that an A100 runs: of those that fit the one with the largest tiles.

    An H100 runs the same, but for the backward of head dims 192/128, which is not among the rows.
    """
    names = [name for name in found if re.search(pattern.replace("{d}", str(dim)), name)]
    few_rows = "ForwardShapeELi2E"
    names = [name for name in names if few_rows not in name]

    def size(name: str) -> list[int]:
        return [int(x) for x in re.findall(r"L[ib](\d+)E", name)]

    return found[max(names, key=size)] if names else None


def tool(name: str) -> str | None:
    """cuobjdump: of the toolkit, or of the wheel nvidia-cuda-cuobjdump."""
    wheels = (Path(p) / "nvidia" for p in sys.path)
    places = [p / "bin" / name for w in wheels if w.is_dir() for p in w.iterdir()]
    places.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name)
    return shutil.which(name) or next((str(p) for p in places if p.exists()), None)


def torch_kernels(cuobjdump: str, sass: str, keep: Path) -> list[Path]:
    """FlashAttention-2's code in torch, by GPU; taken out once."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    folder = keep / f"{torch.__version__}-{sass}"
    if not folder.exists() and library.exists():
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=keep) as taken:
            command = [cuobjdump, "-xelf", f".{sass}.", str(library)]
            subprocess.run(command, cwd=taken, check=True, stdout=subprocess.DEVNULL)
            for item in Path(taken).iterdir():
                data = item.read_bytes()
                if b"flash_fwd_kernel" not in data and b"flash_bwd_dq_dk_dv" not in data:
                    item.unlink()
            Path(taken).rename(folder)
            Path(taken).mkdir()
    return sorted(folder.glob("*.cubin")) if folder.exists() else []


def matching(binary: Path, way: Way, dim: int) -> list[str]:
    """The kernels of a binary that a way is looking for."""
    names = set(re.findall(rb"_ZN\w+", binary.read_bytes()))
    patterns = [pattern.replace("{d}", str(dim)) for pattern, _ in way.kernels]
    found = [name.decode() for name in names]
    # Host code has others at its ends: an exact name ends in the type of its parameters.
    return sorted(n for n in found if any(re.search(p + r"\w*$", n) for p in patterns))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda", help="of make cuda")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args()
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        print("gpu_model: skipped, there is no cuobjdump; pip install nvidia-cuda-cuobjdump")
        return
    objects = sorted(options.build.glob("temp*/csrc/cuda/sm80/*bf16*.o"))
    if not objects:
        print(f"gpu_model: skipped, there are no objects in {options.build}; make cuda")
        return
    print("Predicted share of the tensor cores' peak, bf16, full mask. Nothing here was timed.\n")
    print("| GPU | | head dim | kernels of | serial | overlap | bound | published |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, gpu), way, dim in itertools.product(GPUS.items(), WAYS, options.head_dim):
        theirs = way.whose == "FlashAttention-2"
        binaries = torch_kernels(cuobjdump, gpu.sass, options.build / "fa2") if theirs else objects
        found: dict[str, Code] = {}
        for binary in binaries:
            if names := matching(binary, way, dim):
                found |= machine_code(cuobjdump, binary, gpu.sass, names)
        codes = [chosen(pattern, dim, found) for pattern, _ in way.kernels]
        uses = [
            use(code, made, gpu)
            for code, (_, made) in zip(codes, way.kernels, strict=True)
            if code is not None
        ]
        if len(uses) < len(way.kernels):
            continue
        serial, overlap = way.predicted(uses)
        published = PUBLISHED.get((name, way.direction, dim), "") if theirs else ""
        bound = " + ".join(u.bound for u in uses)
        print(
            f"| {name} | {way.direction} | {dim} | {way.whose} | {serial:.0%} | {overlap:.0%} "
            f"| {bound} | {published} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
