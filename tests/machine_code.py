# SPDX-License-Identifier: BSD-3-Clause
"""Loops of multiply-adds in the output of `objdump -d`, and what is wrong with them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\s+(?:\{\w+\}\s+)?(\S+)\s*([^#<]*)")
MULTIPLY_ADD = re.compile(r"vfmadd\d+ps|vdpbf16ps")
MEMORY_LAST = re.compile(r"\)(\{%k\d\})?$")


@dataclass(frozen=True)
class Tile:
    """The full register tile of an ISA: per step in k, `vecs` loads and `rows` broadcasts."""

    register: str
    rows: int
    vecs: int

    @property
    def sums(self) -> int:
        return self.rows * self.vecs

    @property
    def most_loads(self) -> float:
        """Per multiply-add."""
        return (self.rows + self.vecs) / self.sums


AVX2, AVX512 = Tile("%ymm", 6, 2), Tile("%zmm", 6, 4)


@dataclass(frozen=True)
class Instruction:
    """One line of `objdump -d`. In AT&T's order the destination is the last operand."""

    address: int
    name: str
    operands: str
    register: str = AVX512.register  # what vectors are in

    @property
    def leaves(self) -> bool:
        return self.name.startswith(("j", "call", "ret", "notrack", "bnd"))

    @property
    def target(self) -> int | None:
        """Where a conditional jump goes."""
        if not self.name.startswith("j") or self.name.startswith("jmp"):
            return None
        return int(self.operands, 16)

    @property
    def wide(self) -> bool:
        return self.register in self.operands

    @property
    def multiplies(self) -> bool:
        return self.wide and MULTIPLY_ADD.fullmatch(self.name) is not None

    @property
    def loads(self) -> bool:
        return self.wide and "(" in self.operands and MEMORY_LAST.search(self.operands) is None

    @property
    def folds(self) -> bool:
        """A multiply-add of a vector in memory. One at (%rip) is a constant, no lanes."""
        plain = "{1to16}" not in self.operands and "(%rip)" not in self.operands
        return self.multiplies and self.loads and plain

    def moves_on(self, stack: Sequence[str]) -> bool:
        on_stack = any(f"({register}" in self.operands for register in stack)
        return self.wide and self.name.startswith("vmov") and on_stack

    def __str__(self) -> str:
        return f"{self.address:x}: {self.name} {self.operands}"


@dataclass(frozen=True)
class Loop:
    """A loop without jumps inside, of a function that reaches its stack by the registers `stack`.

    It does one register tile or part of one: `sums` is the number of registers it adds to.
    """

    body: Sequence[Instruction]
    stack: Sequence[str]
    tile: Tile

    @property
    def multiplies(self) -> int:
        return sum(i.multiplies for i in self.body)

    @property
    def sums(self) -> int:
        return len({i.operands.rsplit(",", 1)[-1] for i in self.body if i.multiplies})

    @property
    def offences(self) -> list[str]:
        found = [f"spill: {i}" for i in self.body if i.moves_on(self.stack)]
        found += [f"folded load: {i}" for i in self.body if i.folds]
        loads = sum(i.loads for i in self.body)
        # Smaller tiles at the edges load more often.
        if self.sums >= self.tile.sums and loads > self.tile.most_loads * self.multiplies:
            found.append(f"{self.body[0]}: {loads} loads for {self.multiplies} multiply-adds")
        return found


def parsed(text: str, tile: Tile = AVX512) -> list[Instruction]:
    matches = (INSTRUCTION.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3].strip(), tile.register) for m in matches if m]


def product_loops(function: Sequence[Instruction], tile: Tile = AVX512) -> list[Loop]:
    """The innermost loops with as many multiply-adds as one step of a full register tile."""
    index = {instruction.address: i for i, instruction in enumerate(function)}
    # Elsewhere %rbp is a register like others.
    framed = any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in function)
    stack = ("%rsp", "%rbp") if framed else ("%rsp",)
    loops = []
    for end, jump in enumerate(function):
        begin = index.get(jump.target, end + 1) if jump.target is not None else end + 1
        body = function[begin:end]
        if begin <= end and not any(i.leaves for i in body):
            loops.append(Loop(body, stack, tile))
    return [loop for loop in loops if loop.multiplies >= tile.sums]
