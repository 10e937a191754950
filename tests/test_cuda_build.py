# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler made of the CUDA kernels, for every GPU: after `make cuda`, which needs nvcc.

tests/cuda_budget.json says what each kernel may use per GPU: registers, bytes of spills and of
static shared memory, and how many blocks then fit on a multiprocessor. More than that fails here,
and so does less: the budget follows. What kernels execute is in test_ptx_counts.py.

    python tests/test_cuda_build.py     # writes the budget as it is now
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from gpu_model import Code, machine_code
from test_ptx_counts import BUDGET as COUNTED
from test_ptx_counts import plain

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda"
BUDGET = Path(__file__).with_name("cuda_budget.json")
# KiB of shared memory and threads of a multiprocessor.
GPUS = {"sm_80": (164, 2048), "sm_90": (228, 2048), "sm_100": (228, 2048), "sm_120": (100, 1536)}
HOPPER = {"sm_90a": GPUS["sm_90"]}  # for the kernels of namespace sm90 alone


@dataclass(frozen=True)
class Use:
    """What ptxas says of a kernel on a GPU."""

    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes; dynamic shared memory is chosen at the launch

    def blocks(self, gpu: str, threads: int, shared_bytes: int) -> int:
        """How many blocks fit on a multiprocessor; 0: it is for larger ones."""
        kib, most_threads = (GPUS | HOPPER)[gpu]
        # Registers go to warps by 256, and each block takes a KiB of shared memory by itself.
        of_warp = 32 * (-(-self.registers // 8) * 8)
        by_registers = (65536 // of_warp) // -(-threads // 32)
        return min(by_registers, kib * 1024 // (shared_bytes + 1024), most_threads // threads)


Report = dict[str, dict[str, Use]]  # by kernel and GPU


def report(log: str) -> Report:
    """The last word of ptxas -v on every kernel."""
    found: Report = defaultdict(dict)
    kernel, gpu, spilled = "", "", 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, gpu = entry[1], entry[2]
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[kernel][gpu] = Use(int(used[1]), spilled, int(shared[1]) if shared else 0)
    return found


def serialized(log: str) -> dict[str, str]:
    """The kernels whose products the compiler lets run one after the other, and why: the last word.

    It says so before it compiles the kernel.
    """
    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for line in log.splitlines():
        if remark := re.search(r"(wgmma\S* .*due to .*) (?:in|for) the function '(\w+)'", line):
            reasons[remark[2]] = remark[1]
        elif entry := re.search(r"Compiling entry function '(\w+)'", line):
            found.pop(entry[1], None)
            if entry[1] in reasons:
                found[entry[1]] = reasons.pop(entry[1])
    return found


def kernels_of(binary: Path, kernels: Iterable[str]) -> set[str]:
    """Which of the kernels an object or library holds: it registers them by their names."""
    strings = set(binary.read_bytes().split(b"\0"))
    return {kernel for kernel in kernels if kernel.encode() in strings}


@pytest.fixture(scope="module")
def built() -> Report:
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is no nvcc on this machine")
    if not any((BUILD / "lib" / "ring_attention").glob("_C_cuda.*so")):
        pytest.skip("the CUDA operators have not been compiled: make cuda")
    return in_library(report((BUILD / "log").read_text()))


def in_library(found: Report) -> Report:
    """Without the kernels of earlier builds that are gone."""
    (library,) = (BUILD / "lib" / "ring_attention").glob("_C_cuda.*so")
    return {kernel: found[kernel] for kernel in kernels_of(library, found)}


def lines(found: Report) -> dict[str, dict[str, dict[str, int]]]:
    """The budget; blocks of the kernels that the virtual GPU has run."""
    taken = json.loads(COUNTED.read_text())  # with what a block takes

    def line(kernel: str, gpu: str, use: Use) -> dict[str, int]:
        # Tiles are the same for both 16-bit types and with a softcap: the counts have one of each.
        counted = kernel.replace("7Float16", "8BFloat16")
        block = taken.get(counted, taken.get(counted.replace("ELb1EEEvNS0_11F", "ELb0EEEvNS0_11F")))
        if block is None:
            return asdict(use)
        return asdict(use) | {"blocks": use.blocks(gpu, block["threads"], block["shared_bytes"])}

    return {
        plain(kernel): {gpu: line(plain(kernel), gpu, use) for gpu, use in sorted(uses.items())}
        for kernel, uses in sorted(found.items())
    }


def test_every_kernel_is_within_its_budget(built: Report) -> None:
    assert BUDGET.exists(), "no budget is written down yet: python tests/test_cuda_build.py"
    budget = json.loads(BUDGET.read_text())
    now = lines(built)
    assert sorted(now) == sorted(budget), "kernels came or went: python tests/test_cuda_build.py"
    wrong = [
        f"{kernel} on {gpu}: {use}, budget {budget[kernel].get(gpu)}"
        for kernel, uses in now.items()
        for gpu, use in uses.items()
        if use != budget[kernel].get(gpu)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_compiled_for_every_gpu(built: Report) -> None:
    assert built
    for kernel, uses in built.items():
        assert sorted(uses) == sorted(HOPPER if "4sm90" in kernel else GPUS), kernel


def test_forward_kernels_do_not_spill(built: Report) -> None:
    """Hopper's do, outside of the loop over key tiles: the test after this one."""
    forwards = {
        kernel: uses
        for kernel, uses in built.items()
        if "forward" in kernel and "4sm90" not in kernel
    }
    assert forwards
    spilling = {
        (kernel, gpu): use.spilled
        for kernel, uses in forwards.items()
        for gpu, use in uses.items()
        if use.spilled
    }
    assert not spilling


def key_loop(code: Code) -> Code:
    """The innermost loop that multiplies and takes exponentials."""
    back = [(i.target, i.at) for i in code if i.target is not None and i.target < i.at]
    bodies = [[j for j in code if begin <= j.at <= end] for begin, end in back]
    return min((x for x in bodies if {"HGMMA", "MUFU"} <= {i.op for i in x}), key=len)


def test_hoppers_forward_spills_nothing_in_its_loop(built: Report) -> None:
    triton = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin"
    cuobjdump = shutil.which("cuobjdump", path=f"{os.environ['PATH']}:{triton}")
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump on PATH, nor with torch's triton")
    objects = sorted(BUILD.glob("temp*/csrc/cuda/sm90/forward_*.o"))
    assert objects
    for item in objects:
        (kernel,) = kernels_of(item, built)
        (code,) = machine_code(cuobjdump, item, "sm_90a", [kernel]).values()
        memory = [i.name for i in key_loop(code) if i.op in ("LDL", "STL")]
        assert not memory, kernel


def test_hoppers_products_run_beside_other_work(built: Report) -> None:
    reasons = serialized((BUILD / "log").read_text())
    assert any("4sm90" in kernel for kernel in built)
    assert not {kernel: why for kernel, why in reasons.items() if kernel in built}


def test_each_object_holds_only_its_kernels(built: Report) -> None:
    """A kernel compiled in two files is compiled twice, and which of them runs is chance."""
    holders = defaultdict(list)
    for item in BUILD.glob("temp*/csrc/cuda/**/*.o"):
        for kernel in kernels_of(item, built):
            holders[kernel].append(item.name)
    assert holders.keys() == built.keys()
    assert all(len(names) == 1 for names in holders.values()), dict(holders)


@pytest.mark.parametrize(
    ("registers", "gpu", "threads", "kib", "blocks"),
    [
        (255, "sm_80", 128, 73, 2),  # by shared memory, and by registers
        (168, "sm_80", 64, 33, 4),
        (168, "sm_90", 64, 33, 6),
        (255, "sm_120", 256, 100, 0),
        (32, "sm_120", 1024, 0, 1),
    ],
)
def test_blocks_on_a_multiprocessor(
    registers: int, gpu: str, threads: int, kib: int, blocks: int
) -> None:
    assert Use(registers, 0, 0).blocks(gpu, threads, kib * 1024) == blocks


def test_the_report_is_read() -> None:
    log = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem
"""
    assert report(log) == {"_Z1kv": {"sm_80": Use(registers=168, spilled=28, shared=128)}}


def test_the_last_word_on_products_counts() -> None:
    remark = (
        "ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining input registers in the function '_Z1kv'"
    )
    entry = "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'"
    why = "wgmma.mma_async instructions are serialized due to non wgmma instructions defining"
    assert serialized(f"{remark}\n{entry}\n") == {"_Z1kv": why + " input registers"}
    assert serialized(f"{remark}\n{entry}\n{entry}\n") == {}
    other = remark.replace("in the function", "for the function")
    assert serialized(f"{other}\n{entry}\n") == {"_Z1kv": why + " input registers"}


if __name__ == "__main__":
    found = in_library(report((BUILD / "log").read_text()))
    BUDGET.write_text(json.dumps(lines(found), indent=1) + "\n")
