# SPDX-License-Identifier: BSD-3-Clause
"""The backward's calls, and what only the kernel before them has to find out about rows."""

from collections.abc import Iterator
from functools import partial

import torch
from mutant_backward import cases as backward_cases
from mutant_backward import cases_of
from mutant_problems import Case, Drive

import intervals as masks
import problems as t


def cases(drive: Drive) -> Iterator[Case]:
    yield from backward_cases(drive)
    # Rows of 128 columns in float32 pass by in tiles of 16, half of what a warp takes at a time.
    for dtype, dim in ((drive.dtype, drive.dims[0]), (torch.float32, 128)):
        shape = {"heads": 1, "kv_heads": 1, "q_len": 40, "head_dim": dim}
        # A whole tile of keys, of any kernel, that no row sees.
        later = partial(masks.late, first=150)
        yield from cases_of("later", t.problem(dtype, later, batch=1, k_len=700, **shape), (300,))
        for mask in (masks.one_row_differs, masks.one_row_sees):
            p = t.problem(dtype, mask, batch=12, k_len=128, **shape)
            yield from cases_of(f"{mask.__name__}, {dim}", p, ())
