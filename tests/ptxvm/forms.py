# SPDX-License-Identifier: BSD-3-Clause
"""Instruction forms, an opcode with all its words: which the kernels use, and who vouches for them.

    python tests/ptxvm/forms.py      lists those of our kernels that no calibrator covers

A form is covered by a calibrator that executed it (calibrated_forms.txt, written by calibrate.py)
or by a unit kernel with a known answer.
"""

import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE / "calibrated_forms.txt"
BUILDS = [HERE.parents[1] / "build" / name for name in ("ptxvm", "cuda")]
_STATEMENT = re.compile(r"(?:@!?%?\w+\s+)?([a-z]\w*(?:\.\w+(?:::\w+)?)*)(?=\s|$)")
_LABELS = re.compile(r"^(?:\s*[$\w]+:(?!:))*")


def in_ptx(text: str) -> set[str]:
    """The forms of a PTX module: of its statements, not of its directives and declarations."""
    statements = re.split(r"[;{}]|^\s*\.loc[^\n]*$", re.sub(r"//[^\n]*", "", text), flags=re.M)
    matches = (_STATEMENT.match(_LABELS.sub("", x).strip()) for x in statements)
    return {match[1] for match in matches if match}


def in_objects(paths: Iterable[Path]) -> set[str]:
    """The forms of the PTX that nvcc left in objects, uncompressed."""
    forms = set()
    for path in paths:
        for text in re.findall(rb"\.version [^\0]*", path.read_bytes()):
            forms |= in_ptx(text.decode())
    return forms


def of_our_kernels() -> set[str]:
    """Those that `make vm` or `make cuda` compiled last; none if there is no build."""
    builds = [sorted(build.glob("temp*/csrc/cuda/**/*.o")) for build in BUILDS]
    newest = [max((x.stat().st_mtime for x in objects), default=0.0) for objects in builds]
    return in_objects(builds[newest.index(max(newest))])


def calibrated() -> set[str]:
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    return {line for line in lines if line and not line.startswith("#")}


if __name__ == "__main__":
    print(*sorted(of_our_kernels() - calibrated()), sep="\n")
