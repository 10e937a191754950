# SPDX-License-Identifier: BSD-3-Clause
"""What a trace is made of: intervals of ranks and their messages."""

from dataclasses import dataclass
from typing import Literal

Name = Literal["compute", "post", "transfer", "wait"]
Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Leg:
    """One message of a hop, seen from the rank that posted it.

    Attributes:
        peer: group rank it goes to or comes from.
        kind: "K/V" or "dK/dV".
        sending: whether it goes or comes.
        bytes: payload.
    """

    peer: int
    kind: str
    sending: bool
    bytes: int


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
        group: the name of the group, the same on all its ranks.
        place: which process or virtual rank this was, "rank3" or "virtual3".
        legs: the messages, empty for compute.
    """

    name: Name
    phase: Phase
    rank: int
    step: int
    start_s: float
    end_s: float
    bytes: int = 0
    group: str = ""
    place: str = ""
    legs: tuple[Leg, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


def label(name: Name, phase: Phase, step: int) -> str:
    """What an interval is called in the files and in torch's profiler."""
    return f"ring_attention {phase} {step} {name}"
