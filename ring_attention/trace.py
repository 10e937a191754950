# SPDX-License-Identifier: BSD-3-Clause
"""What each rank did when: compute, post, transfer and wait intervals of the ring."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Name = Literal["compute", "post", "transfer", "wait"]
Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Event:
    """One interval of one rank's ring, on the machine's monotonic clock.

    Attributes:
        name: "compute" (a block kernel), "post" (packing and posting messages), "transfer" (from
            posting until the messages were seen complete: an upper bound of the time on the wire)
            or "wait" (the rank had nothing to compute and waited).
        phase: "forward" or "backward".
        rank: group rank.
        step: the plan's step.
        start_s, end_s: seconds; comparable between processes of one machine.
        bytes: payload sent and received, 0 for compute.
    """

    name: Name
    phase: Phase
    rank: int
    step: int
    start_s: float
    end_s: float
    bytes: int = 0


_recorders: list[list[Event]] = []
_lock = threading.Lock()


@contextmanager
def record() -> Iterator[list[Event]]:
    """Collects the events of every ring call in this process, from all its (virtual) ranks.

    Example:
        >>> with ring_attention.trace.record() as events:
        ...     ring_attention.attention(q, k, v, group=group, layout=layout)
        >>> waited_s = sum(e.end_s - e.start_s for e in events if e.name == "wait")
    """
    events: list[Event] = []
    with _lock:
        _recorders.append(events)
    try:
        yield events
    finally:
        with _lock:
            # By identity: two recorders may hold equal events.
            _recorders[:] = [kept for kept in _recorders if kept is not events]


def now() -> float:
    """Seconds on the clock of the events."""
    return time.monotonic()


def emit(name: Name, phase: Phase, rank: int, step: int, start_s: float, nbytes: int = 0) -> None:
    """Adds an event that ends now to every active recorder."""
    if _recorders:
        event = Event(name, phase, rank, step, start_s, now(), nbytes)
        for events in list(_recorders):
            events.append(event)
