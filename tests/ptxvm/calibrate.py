# SPDX-License-Identifier: BSD-3-Clause
"""Runs kernels that are known to be right on GPUs in the virtual GPU: is it right about them?

    make calibrate

FlashAttention-2, forward and backward, from its source distribution, and a GEMM of CUTLASS's
examples, both from PyPI into build/calibrate. They must give right results and nothing may be
reported, with three seeds (but that they load, ahead of time and without use, shared memory that
nobody wrote: that rule is ours). Negative controls: with an ldmatrix that is wrong on purpose each
of them must fail. The instruction forms that they execute are written to calibrated_forms.txt.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiler
import forms
from compiler import HERE, NVCC

BUILD = HERE.parents[1] / "build" / "calibrate"
SEEDS = ("1", "2", "3")
FLASH, CUTLASS = "flash_attn-2.8.3", "nvidia_cutlass-4.2.0.0"
FLASH_SOURCES = BUILD / FLASH / "csrc"
CUTLASS_SOURCES = BUILD / CUTLASS / "cutlass_library" / "source"
GEMM = "23_ampere_gemm_operand_reduction_fusion/ampere_gemm_operand_reduction_fusion.cu"
FLASH_INCLUDES = [
    HERE / "calibrate" / "stand_in",
    FLASH_SOURCES / "flash_attn" / "src",
    FLASH_SOURCES / "cutlass" / "include",
]
GEMM_INCLUDES = [CUTLASS_SOURCES / x for x in ("include", "tools/util/include", "examples/common")]
# Variants of the kernels that are not called.
WITHOUT = ["DROPOUT", "ALIBI", "UNEVEN_K", "SOFTCAP", "LOCAL"]
FLAGS = ["-std=c++17", "-O3", "-w"]


def fetch() -> None:
    """Downloads and unpacks what is not there yet."""
    BUILD.mkdir(parents=True, exist_ok=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(BUILD)]
    if not FLASH_SOURCES.exists():
        # To download a source distribution pip asks its setup.py for its name, which takes psutil.
        subprocess.run([*install, "psutil"], check=True)
        options = ["--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run([*pip, *options, FLASH.replace("_", "-").replace("n-2", "n==2")], check=True)
        with tarfile.open(BUILD / f"{FLASH}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    if not CUTLASS_SOURCES.exists():
        subprocess.run([*pip, CUTLASS.replace("_", "-").replace("s-4", "s==4")], check=True)
        with zipfile.ZipFile(next(BUILD.glob(f"{CUTLASS}-*.whl"))) as archive:
            archive.extractall(BUILD / CUTLASS)


def compiled(source: Path, includes: list[Path], *flags: str) -> Path:
    """The object of a source, unless it is there and newer."""
    target = BUILD / f"{source.stem}.o"
    headers = [source, *HERE.glob("calibrate/**/*.h"), HERE / "vm.h"]
    if target.exists() and target.stat().st_mtime > max(x.stat().st_mtime for x in headers):
        return target
    host = source.suffix == ".cpp"
    command = [compiler.CXX[0]] if host else [str(NVCC), *compiler.PTX, "--expt-relaxed-constexpr"]
    folders = [f"-I{x}" for x in (*includes, *([compiler.TOOLKIT] if host else []))]
    command += [*FLAGS, *flags, *folders, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def build() -> dict[str, list[str]]:
    """The programs, and what they are called with before the seed."""
    here = HERE / "calibrate"
    flash = [f"-DFLASHATTENTION_DISABLE_{name}" for name in WITHOUT] + ["--use_fast_math"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compiled, here / "flash_backward.cu", FLASH_INCLUDES, *flash),
            pool.submit(compiled, here / "flash_forward.cu", FLASH_INCLUDES, *flash),
            pool.submit(compiled, CUTLASS_SOURCES / "examples" / GEMM, GEMM_INCLUDES),
            pool.submit(compiled, here / "flash.cpp", FLASH_INCLUDES),
            pool.submit(compiled, here / "options.cpp", []),
        ]
        machine = list(pool.map(compiler.compile_object, compiler.machine()))
        *flash_objects, gemm, main, options = (job.result() for job in jobs)
    programs = {"flash": [*flash_objects, main], "gemm": [gemm]}
    for name, objects in programs.items():
        parts = map(str, [*objects, options, *machine])
        subprocess.run([compiler.CXX[0], *parts, "-o", str(BUILD / name)], check=True)
    # The call of the example: whole and uneven tiles.
    size = ["--m=136", "--n=264", "--k=96", "--split-k-slices=1"]
    return {"flash": [], "gemm": [*size, "--reference-check", "--iterations=1"]}


def run(program: str, call: list[str], **options: str) -> subprocess.CompletedProcess[str]:
    # Lenient: they read ahead of what was written and do not use it. Ours may not.
    options["LENIENT"] = "1"
    environment = {**os.environ, **{f"PTXVM_{name}": value for name, value in options.items()}}
    return subprocess.run(
        [str(BUILD / program), *call], env=environment, capture_output=True, text=True, check=False
    )


def succeeded(result: subprocess.CompletedProcess[str]) -> bool:
    # The example compares, and ends with 0 in any case.
    return result.returncode == 0 and "miscompared" not in result.stdout


def main() -> None:
    if NVCC is None:
        raise SystemExit("calibrate: nvcc is missing (PATH, CUDA_HOME)")
    fetch()
    problems, executed = [], set()
    for program, call in build().items():
        for seed in SEEDS:
            written = BUILD / f"{program}.forms"
            result = run(program, call, SEED=seed, FORMS=str(written))
            print(result.stdout, result.stderr, sep="", end="", flush=True)
            executed |= set(written.read_text().split())
            if not succeeded(result):
                problems.append(f"{program} fails with seed {seed}")
        for wrong, what in {"1": "rows for columns", "2": "matrices exchanged"}.items():
            failed = not succeeded(run(program, call, WRONG_LDMATRIX=wrong))
            print(f"{program}, ldmatrix with {what}: {'fails, as it must' if failed else 'PASSES'}")
            if not failed:
                problems.append(f"{program} does not notice an ldmatrix with {what}")
    if problems:
        raise SystemExit(f"calibrate: {'; '.join(problems)}")
    lines = [
        "# SPDX-License-Identifier: BSD-3-Clause",
        f"# Executed by {FLASH}, forward and backward, and by {CUTLASS},",
        f"# examples/{GEMM}; written by calibrate.py.",
        *sorted(executed),
    ]
    forms.RECORD.write_text("\n".join(lines) + "\n")
    print(f"{len(executed)} instruction forms, written to {forms.RECORD.name}")


if __name__ == "__main__":
    main()
