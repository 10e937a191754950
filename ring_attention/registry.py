# SPDX-License-Identifier: BSD-3-Clause
"""Plans as tensors.

A compiled graph knows a plan by an int64 CPU tensor [id, digest]: a string or an int that changes
with every batch would recompile, a tensor does not. The registry finds every plan that is alive and
keeps the latest ones alive by itself, for compiled graphs that save a copy of the handle.
"""

import itertools
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rank_plan import Plan

KEPT_PLANS = 256

_ids = itertools.count()
_lock = threading.Lock()
_alive: "weakref.WeakValueDictionary[int, Plan]" = weakref.WeakValueDictionary()
_kept: "deque[Plan]" = deque(maxlen=KEPT_PLANS)


def register(plan: "Plan") -> Tensor:
    """Makes a plan findable; returns its handle, an int64 CPU tensor [id, digest]."""
    with _lock:
        key = next(_ids)
        _alive[key] = plan
        _kept.append(plan)
    handle = torch.tensor([key, plan.digest], device="cpu")
    # What autograd saves is this very tensor: while a graph lives, so does its plan.
    handle.plan = plan
    return handle


def plan_of(handle: Tensor) -> "Plan":
    """The plan behind a handle.

    Raises:
        RuntimeError: the plan is gone; its owner dropped it and many newer ones were made.
    """
    key, digest = handle.tolist()
    with _lock:
        plan = _alive.get(key)
    if plan is None or plan.digest != digest:
        raise RuntimeError(
            f"ring_attention: expected the plan of handle {key} to be alive, got none: over "
            f"{KEPT_PLANS} newer plans were made; keep a reference to a plan until its backward"
        )
    return plan
