# SPDX-License-Identifier: BSD-3-Clause
"""The machine code of the AVX2 and AVX-512 products: results do not show what the compiler did.

Two habits of compilers have each cost these loops a good part of their speed: to keep vectors of
sums on the stack, and to fold the load of B's lanes into every multiply-add that uses them, which
makes the loop wait for loads.
"""

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import ring_attention
from machine_code import AVX2, AVX512, Loop, parsed, product_loops

ROWS, VECS, SUMS = AVX512.rows, AVX512.vecs, AVX512.sums  # of the code made by hand

# Every element type of an arch: g++ makes one function of those that come out the same.
ARCHS = {
    "avx2": (r"Avx2Arch<\w+>", AVX2),
    "avx512": (r"Avx512Arch<\w+>", AVX512),
    "avx512_bf16": ("Bf16DotArch", AVX512),
}
KERNELS = [
    "multiply_into<{}>",
    "Forward<{}>::fold_scores",
    "Backward<{}>::probabilities",
    "Backward<{}>::score_gradients",
]
NAMESPACE = "ring_attention::cpu::(anonymous namespace)::"

# --- of the parser, on code made by hand ------------------------------------------------------

A_STEP = [
    *(f"vmovups {64 * v:#x}(%rdx),%zmm{24 + v}" for v in range(VECS)),
    *(
        line
        for row in range(ROWS)
        for line in (
            f"vbroadcastss {4 * row:#x}(%rax),%zmm28",
            *(f"vfmadd231ps %zmm{24 + v},%zmm28,%zmm{VECS * row + v}" for v in range(VECS)),
        )
    ),
]
A_FMA = A_STEP.index("vfmadd231ps %zmm25,%zmm28,%zmm1")


def loops_of(step: Sequence[str], before: Sequence[str] = ()) -> list[Loop]:
    """The product loops of a function that does nothing but `step`, over and over."""
    after = [*step, "add    $0x18,%rax", "cmp    %rbx,%rax", f"jne    {len(before):x} <f+0x10>"]
    lines = [*before, *after, "vzeroupper", "ret"]
    text = "\n".join(f"{i:8x}:\t{line}" for i, line in enumerate(lines))
    return product_loops(parsed(f"\nlib.so:     file format elf64-x86-64\n\n0000 <f>:\n{text}\n"))


def offences(step: Sequence[str], before: Sequence[str] = ()) -> list[str]:
    (loop,) = loops_of(step, before)
    return [offence.split(":")[0] for offence in loop.offences]


def test_a_good_loop_passes() -> None:
    (loop,) = loops_of(["prefetcht0 (%rsp)", *A_STEP, "mov    %rdx,0x8(%rsp)"], ["push   %rbp"])
    assert (loop.multiplies, loop.sums, loop.offences) == (SUMS, SUMS, [])
    assert offences(A_STEP + A_STEP) == []


def test_a_broadcast_may_be_part_of_the_multiply_add() -> None:
    step = [line.replace("%zmm28", "0x4(%rax){1to16}") for line in A_STEP if "cast" not in line]
    step = [re.sub(r"(%zmm\d+),(\S+}),", r"\2,\1,", line) for line in step]
    assert "vfmadd231ps 0x4(%rax){1to16},%zmm25,%zmm1" in step
    (loop,) = loops_of(step)
    assert not any(i.folds for i in loop.body)
    # But a broadcast per multiply-add is a load per multiply-add.
    assert [offence.split(":")[0] for offence in loop.offences] == ["0"]


@pytest.mark.parametrize(
    "move",
    [
        "vmovaps %zmm3,0x40(%rsp)",
        "vmovups -0x40(%rsp),%zmm29",
        "vmovdqa64 %zmm3,(%rsp,%rcx,1)",
        "vmovaps -0x150(%rbp),%zmm29",
    ],
)
def test_a_spill_is_found(move: str) -> None:
    frame = ["push   %rbp", "mov    %rsp,%rbp"]
    assert "spill" in offences([*A_STEP, move], frame)


def test_rbp_is_the_stack_only_with_a_frame() -> None:
    lanes = [line.replace("(%rdx)", "(%rbp)") for line in A_STEP]
    assert offences(lanes) == []
    assert offences(lanes, ["mov    %rsp,%rbp"]) == ["spill"] * VECS


@pytest.mark.parametrize("name", ["vfmadd231ps", "vfmadd132ps", "vdpbf16ps"])
def test_a_folded_load_is_found(name: str) -> None:
    step = list(A_STEP)
    step[A_FMA] = f"{name} 0x40(%rdx),%zmm28,%zmm1"
    del step[1]  # so that the number of loads stays
    assert offences(step) == ["folded load"]
    step[A_FMA - 1] = f"{name} 0x18223(%rip),%zmm28,%zmm1        # 246b80 <_fini+0x142c>"
    assert offences(step) == []


def test_repeated_loads_are_found() -> None:
    assert offences([*A_STEP, "vmovups 0x40(%rdx),%zmm29"]) == ["0"]


def test_only_innermost_loops_of_products_count() -> None:
    assert len(loops_of(A_STEP)) == 1
    assert loops_of([*A_STEP, "call   80 <g>"]) == []
    assert loops_of([*A_STEP, "jmp    80 <g>"]) == []
    assert loops_of([line for line in A_STEP if "%zmm28,%zmm1" not in line]) == []
    assert loops_of([line.replace("zmm", "ymm") for line in A_STEP]) == []
    assert product_loops(parsed("\n".join(f"{i:4x}:\t{x}" for i, x in enumerate(A_STEP)))) == []


# --- of the library ---------------------------------------------------------------------------


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def library() -> Path:
    (path,) = Path(ring_attention.__file__).parent.glob("_C*.so")
    with path.open("rb") as file:
        magic, machine = struct.unpack("<4s14xH", file.read(20))
    if magic != b"\x7fELF" or machine != 62:
        pytest.skip(f"{path.name} is not for x86-64")
    for tool in ("objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} (of binutils) is missing")
    return path


@pytest.fixture(scope="module")
def functions(library: Path) -> dict[str, tuple[int, int]]:
    """Begin and end of each function, by its demangled name and its begin (clones share names)."""
    found = {}
    for line in output("nm", "-C", "-S", "--defined-only", str(library)).splitlines():
        fields = line.split(maxsplit=3)
        if len(fields) == 4 and fields[2] in "tTwW" and ".cold" not in line:
            begin, size = int(fields[0], 16), int(fields[1], 16)
            name = fields[3].replace(NAMESPACE, "").replace("ring_attention::cpu::", "")
            found[f"{begin:x} {name}"] = (begin, begin + size)
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_inner_loops(
    kernel: str, arch: str, library: Path, functions: dict[str, tuple[int, int]]
) -> None:
    name_of_arch, tile = ARCHS[arch]
    wanted = re.compile(kernel.format(name_of_arch))
    # c++filt may put a space between two closing brackets.
    matching = {n: at for n, at in functions.items() if wanted.search(n.replace("> >", ">>"))}
    assert matching, f"{library} has no function {wanted.pattern}: stripped, or renamed?"
    for name, (begin, end) in matching.items():
        bounds = (f"--start-address={begin:#x}", f"--stop-address={end:#x}")
        code = output("objdump", "-d", "--no-show-raw-insn", *bounds, str(library))
        loops = product_loops(parsed(code, tile), tile)
        assert any(loop.sums >= tile.sums for loop in loops), f"no loop over full tiles in {name}"
        found = [offence for loop in loops for offence in loop.offences]
        assert not found, "\n".join([name, *found])
