# SPDX-License-Identifier: BSD-3-Clause
"""Whether messages get to a busy GPU.

Note [priority]. NCCL moves bytes by kernels, which need room on a multiprocessor like any other. A
hop and the fold that hides it become ready at the same moment, when the fold before them ends; if
the fold's blocks come first, they fill the GPU, and at equal priority NCCL's wait until the last of
them has started: the hop is not hidden at all. A margin of multiprocessors, as persistent kernels
leave it, would be lost to all folds, and is not needed by ours: their blocks are short and many.
One of them (128 query rows; head dim 128, 16,384 keys: a millisecond or so, computed) ends
somewhere every few microseconds, and what waits on a stream of higher priority gets its place.
Nothing running is interrupted. So the group's stream is to have high priority, which only its maker
can give it.
"""

import os
import warnings
from typing import Any

import torch

ADVICE = (
    "make the group with pg_options=ProcessGroupNCCL.Options(is_high_priority_stream=True), or set "
    "TORCH_NCCL_HIGH_PRIORITY=1 before it is made"
)


def is_high(backend: Any) -> bool | None:
    """Whether a backend's stream has high priority; None where it has no such thing."""
    high = getattr(getattr(backend, "options", None), "is_high_priority_stream", None)
    if high is None:
        return None
    # As c10d reads it.
    forced = os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "").lower() in (
        "1",
        "y",
        "yes",
        "t",
        "true",
    )
    return bool(high) or forced


def advise(group: Any, device: torch.device) -> None:
    """Warns once per group whose messages would wait for folds to end."""
    if is_high(group._get_backend(device)) is False:  # private API, the same in torch 2.11 and 2.15
        warnings.warn(
            f"ring_attention: expected the stream of group {group.group_name!r} to have high "
            f"priority, got an ordinary one: its messages start only as folds end; {ADVICE}",
            stacklevel=2,
        )
