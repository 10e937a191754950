# SPDX-License-Identifier: BSD-3-Clause
"""The compiled libraries: loaded here, once; which instruction set they use; their peak."""

from pathlib import Path

import torch
from torch import Tensor

from . import checks


def _load(name: str) -> bool:
    """Loads a library of this package; False where there is none."""
    libraries = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        raise ImportError(
            f"ring_attention: could not load {libraries[0]} with torch {torch.__version__} "
            f"({error}); it needs torch >= 2.11, otherwise {_BUILD}"
        ) from error
    return True


_BUILD = "build it with `pip install .` or `python setup.py build_ext --inplace`"
if not _load("_C"):
    raise ImportError(
        f"ring_attention: expected {Path(__file__).parent}/_C.*so, found none; {_BUILD}"
    )
# Its kernels register for CUDA, so it needs a torch that knows CUDA; a GPU it needs only to run.
if torch.version.cuda is not None and _load("_C_cuda"):
    checks.DEVICES.append("cuda")
OPS = torch.ops.ring_attention


def isa_name() -> str:
    """The instruction set the CPU kernels use: the best supported, or RING_ATTENTION_CPU."""
    name: str = OPS.cpu_isa()
    return name


def isa_names() -> list[str]:
    """The instruction sets this machine supports, best first: values of RING_ATTENTION_CPU."""
    names: list[str] = OPS.cpu_isas()
    return names


def peak_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Floating point operations per second of a loop of nothing but multiply-adds.

    Uses the instruction that the CPU kernels multiply `dtype` with, on torch.get_num_threads()
    threads: the rate that benchmarks measure the kernels against.
    """
    flops: float = OPS.cpu_peak_flops(torch.empty(0, dtype=dtype, device="cpu"), seconds)
    return flops


def mark_written(*tensors: Tensor | None) -> None:
    """Of an operator in place: autograd must notice when a tensor that it saved was written."""
    # Compiled code sees the schema.
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version(
        [x for x in tensors if x is not None and not x.is_inference()]
    )
