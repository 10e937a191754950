# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels execute for a fixed problem, counted by the virtual GPU (make vm).

tests/ptx_budget.json says, per kernel: threads and shared memory of a block; instructions of its
warps, tensor products (mma and wgmma), passes of shared memory, and passes more for bank conflicts.
Two percent more instructions fail, and one more conflict does.

    make vm-build
    RING_ATTENTION_CPU=ptx-sm80 PYTHONPATH=build/ptxvm/lib PYTHONSAFEPATH=1 \\
        python tests/test_ptx_counts.py     # writes the budget as it is now
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ring_attention

BUDGET = Path(__file__).with_name("ptx_budget.json")
COUNTS = ("threads", "shared_bytes", "instructions", "mma", "shared_passes", "bank_conflicts")
# Of two devices, the first also with less shared memory, and of the two backwards.
ROWS = (
    ("ptx-sm80", "163", "deterministic"),
    ("ptx-sm80", "99", "atomic"),
    ("ptx-sm90", "227", "deterministic"),
)
SHAPES = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
RUN = """
import torch
from ring_attention import attention

for head_dim, v_head_dim in %s:
    for dtype in (torch.bfloat16, torch.float32):
        for q_len in (3, 160):
            def normal(heads, rows, dim):
                return torch.randn(1, heads, rows, dim).to(dtype).requires_grad_()
            q = normal(2, q_len, head_dim)
            out = attention(q, normal(1, 192, head_dim), normal(1, 192, v_head_dim))
            out.float().sum().backward()
"""

Counts = dict[str, dict[str, int]]


def plain(kernel: str) -> str:
    """A mangled name without what nvcc makes of its file's place."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", kernel)


def counted(folder: Path) -> Counts:
    """What every kernel executed, over the rows; each in a process of its own."""
    found: Counts = {}
    for isa, smem, backward in ROWS:
        file = folder / f"{isa}-{smem}-{backward}"
        settings = {
            "RING_ATTENTION_CPU": isa,
            "RING_ATTENTION_PTXVM_STATISTICS": str(file),
            "RING_ATTENTION_PTXVM_SEED": "1",
            "RING_ATTENTION_PTXVM_SMEM": smem,
            "RING_ATTENTION_CUDA_BACKWARD": backward,
        }
        run = [sys.executable, "-c", RUN % (SHAPES,)]
        subprocess.run(run, env=os.environ | settings, check=True, timeout=600)
        for line in file.read_text().splitlines():
            kernel, *numbers = line.split()
            counts = dict(zip(COUNTS, map(int, numbers), strict=True))
            found.setdefault(plain(kernel), counts)
    return found


@pytest.mark.vm
def test_kernels_execute_what_their_budget_says(tmp_path: Path) -> None:
    if ring_attention.isa_name() != "ptx-sm80":
        pytest.skip("there is no virtual GPU in this build: make vm")
    budget, now = json.loads(BUDGET.read_text()), counted(tmp_path)
    assert sorted(now) == sorted(budget), "kernels came or went: see this file's head"
    for kernel, counts in now.items():
        allowed = budget[kernel]
        for name in ("threads", "shared_bytes", "mma"):
            assert counts[name] == allowed[name], (name, kernel)
        assert counts["bank_conflicts"] <= allowed["bank_conflicts"], kernel
        assert counts["instructions"] <= 1.02 * allowed["instructions"], kernel


def test_no_kernel_meets_bank_conflicts() -> None:
    """Not in one access of shared memory."""
    budget = json.loads(BUDGET.read_text())
    assert budget and not [k for k, counts in budget.items() if counts["bank_conflicts"] > 0]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        BUDGET.write_text(json.dumps(counted(Path(made)), indent=1, sort_keys=True) + "\n")
