# SPDX-License-Identifier: BSD-3-Clause
"""One kernel on the virtual GPU, and its mutants: the functions of mutation.h."""

import ctypes
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Instruction:
    executed: int  # since the kernel was restored, as compiled
    place: str
    text: str  # without its guard

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def registers(self) -> list[str]:
        """The first is the one written, unless the opcode is among those that write none."""
        return re.findall(r"%\w+", self.text)


class VirtualGpu:
    def __init__(self, kernel: str, readers: Sequence[str] = ()) -> None:
        """kernel and readers: C++ names without namespaces; * stands for anything."""
        from ring_attention import ops

        if not ops.isa_name().startswith("ptx-"):
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
        self.counted = []
        for pattern in (kernel, *readers):
            matching = fnmatch.filter(names, pattern.replace("[", "[[]"))
            if len(matching) != 1:
                raise SystemExit(f"mutants: expected one kernel {pattern}, found {sorted(names)}")
            self.counted.append(names[matching[0]].encode())
        self.kernel = self.counted[0]

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
        """By the kernel as it is now, since it became so, and by its readers."""
        return sum(self.library.ptxvm_executed(one) for one in self.counted)

    def limit(self, instructions: int) -> None:
        self.library.ptxvm_limit_instructions(ctypes.c_uint64(instructions))


def without_consequence(code: Sequence[Instruction]) -> set[int]:
    """Instructions that may be anything: whatever their mutants do, results are the same.

    - Prefetches: the functions that are named so, and what only computes their addresses.
    - The choice between two ways to divide 64-bit numbers, both right: in 32 bits where both
      numbers fit, as those of all tensors that a test can have do.
    """
    return prefetching(code) | addresses_of_prefetches(code) | ways_to_divide(code)


def prefetching(code: Sequence[Instruction]) -> set[int]:
    lines = set()
    for file in ROOT.glob("csrc/cuda/**/*.cuh"):
        inside = False
        for number, line in enumerate(file.read_text().splitlines(), 1):
            inside |= re.search(r"void prefetch_\w+\(", line) is not None
            if inside:
                lines.add(f"{file.relative_to(ROOT)}:{number}")
            inside &= line.strip() != "}"
    return {
        i for i, one in enumerate(code) if lines & set(re.findall(r"csrc/[\w./]+:\d+", one.place))
    }


def readers_of(code: Sequence[Instruction]) -> dict[str, set[int]]:
    """Of each register, guards aside: these are not in an instruction's text."""
    readers = defaultdict(set)
    for i, one in enumerate(code):
        writes = not one.opcode.startswith(("st.", "bra", "bar.", "cp.async", "prefetch", "red."))
        for register in one.registers[1 if writes else 0 :]:
            readers[register].add(i)
    return readers


def addresses_of_prefetches(code: Sequence[Instruction]) -> set[int]:
    readers = readers_of(code)
    hints = {i for i, one in enumerate(code) if one.opcode.startswith("prefetch")}
    while True:
        # Of predicates not all readers are known: comparisons are left out.
        more = {
            i
            for i, one in enumerate(code)
            if one.registers
            and one.opcode.startswith(
                ("add.", "sub.", "mul.", "mad.", "shl.", "cvt", "div.", "rem.")
            )
            and readers[one.registers[0]]
            and readers[one.registers[0]] <= hints
        }
        if more <= hints:
            return hints
        hints |= more


def ways_to_divide(code: Sequence[Instruction]) -> set[int]:
    """or.b64 a, x, y;  and.b64 b, a, -2^32;  setp.eq.s64 p, b, 0;  @p bra. There may be no or."""
    found = set()
    for i, one in enumerate(code[:-2]):
        test, jump = code[i + 1], code[i + 2]
        if (
            one.text.endswith(", -4294967296")
            and test.opcode.startswith(("setp.eq.s64", "setp.ne.s64"))
            and jump.opcode == "bra"
        ):
            found |= {i, i + 1, i + 2}
            if code[i - 1].opcode == "or.b64":
                found.add(i - 1)
    return found


def same_mutants(code: Sequence[Instruction]) -> Callable[[int, str], bool]:
    """Tells of an instruction and its mutant whether that is the kernel again, to be seen by text.

    It may sum the lanes of a warp in another order, and have another number for true.
    """
    reduces, truths = distances(code), flags(code)

    def same(instruction: int, mutant: str) -> bool:
        if instruction in reduces:
            return reaches_all_lanes(reduces[instruction], mutant)
        return instruction in truths and still_true(mutant)

    return same


def distances(code: Sequence[Instruction]) -> dict[int, int]:
    """Where reductions over a warp set the distances of their shuffles: 16, 8, 4, 2 and 1."""
    moves = {}
    for i, one in enumerate(code):
        if match := re.fullmatch(r"mov\.u32 (%r\d+), (16|8|4|2|1)", one.text):
            moves[match[1]] = (i, int(match[2]))
    shuffles = [one.registers[3] for one in code if one.opcode.startswith("shfl.sync.bfly")]
    used = list(dict.fromkeys(moves[register] for register in shuffles if register in moves))
    found = {}
    for five in zip(*(used[start:] for start in range(5)), strict=False):
        if [distance for _, distance in five] == [16, 8, 4, 2, 1]:
            found.update(five)
    return found


def reaches_all_lanes(distance: int, mutant: str) -> bool:
    """Whether such a reduction still sums all lanes, in another order: if the bit is still set.

    Nobody having written the distance, it is -1.
    """
    now = -1 if mutant == "nothing" else int(mutant.split()[-1])
    return now & distance != 0


def flags(code: Sequence[Instruction]) -> set[int]:
    """Where a register becomes 1 for true, and is only ever compared with 0; or a predicate -1."""
    readers = readers_of(code)

    def is_flag(register: str, seen: frozenset[str] = frozenset()) -> bool:
        return register in seen or all(
            re.fullmatch(r"setp\.(eq|ne)\.s16 .*, 0", code[i].text) is not None
            or (code[i].opcode == "mov.u16" and is_flag(code[i].registers[0], seen | {register}))
            for i in readers[register]
        )

    true = re.compile(r"selp\.u16 (%rs\d+), 1, 0, %p\d+|mov\.u16 (%rs\d+), 1")
    return {
        i
        for i, one in enumerate(code)
        if (true.fullmatch(one.text) and is_flag(one.registers[0]))
        or re.fullmatch(r"mov\.pred %p\d+, -1", one.text)
    }


def still_true(mutant: str) -> bool:
    """Whether such a flag has another number for true, and 0 for false as before."""
    return (
        re.fullmatch(
            r"mov\.u16 %rs\d+, \d+|selp\.u16 %rs\d+, \d+, 0, %p\d+|mov\.pred %p\d+, -\d+", mutant
        )
        is not None
    )
