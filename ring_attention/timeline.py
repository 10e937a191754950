# SPDX-License-Identifier: BSD-3-Clause
"""What the traces of all ranks say together: overlap, imbalance, the slowest hop."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .events import Event, Leg, Phase


@dataclass(frozen=True)
class Hop:
    """One message, as its two ends saw it.

    Attributes:
        phase, group, step: of the receiver.
        sender, receiver: group ranks.
        kind: "K/V" or "dK/dV".
        bytes: payload.
        packed_s: its sender began to pack and post.
        began_s: both ends had posted: it could travel.
        ended_s: its receiver saw it complete: an upper bound, exact if the receiver waited.
        waited_s: what the receiver waited in this hop, for all its messages.
        late_s: the part of it before the sender had posted: not the wire's fault.
    """

    phase: Phase
    group: str
    step: int
    sender: int
    receiver: int
    kind: str
    bytes: int
    packed_s: float
    began_s: float
    ended_s: float
    waited_s: float
    late_s: float

    @property
    def seconds(self) -> float:
        """From both ends having posted until it was seen complete."""
        return max(self.ended_s - self.began_s, 0.0)


@dataclass(frozen=True)
class Share:
    """What a rank did in one direction: seconds."""

    compute_s: float
    post_s: float
    transfer_s: float
    wait_s: float

    @property
    def overlap(self) -> float:
        """The share of the time with messages under way that was hidden behind computing."""
        return 1.0 - self.wait_s / self.transfer_s if self.transfer_s else 1.0

    @property
    def ring_s(self) -> float:
        """All of it; transfers run beside the rest."""
        return self.compute_s + self.post_s + self.wait_s

    @property
    def waiting(self) -> float:
        """The share of the time in the ring that was spent waiting."""
        return self.wait_s / self.ring_s if self.ring_s else 0.0


class Timeline:
    """The events of all ranks on one clock."""

    def __init__(self, events: Iterable[Event], hosts: int = 1) -> None:
        self.events = sorted(events, key=lambda e: e.start_s)
        self.hosts = hosts
        self.ranks = sorted({(e.group, e.rank) for e in self.events})
        self.hops = list(self._hops())

    def share(self, phase: Phase, group: str, rank: int) -> Share:
        """What one rank's time in a direction went into."""
        spent: dict[str, float] = defaultdict(float)
        for e in self.events:
            if (e.phase, e.group, e.rank) == (phase, group, rank):
                spent[e.name] += e.seconds
        return Share(spent["compute"], spent["post"], spent["transfer"], spent["wait"])

    def imbalance(self, phase: Phase, group: str) -> float:
        """The most loaded rank's computing over the mean."""
        loads = [self.share(phase, g, rank).compute_s for g, rank in self.ranks if g == group]
        mean = sum(loads) / len(loads)
        return max(loads) / mean if mean else 1.0

    def late_s(self, phase: Phase, group: str, rank: int) -> float:
        """How long a rank waited for others to post; of several messages of a hop the latest."""
        late: dict[float, float] = defaultdict(float)
        for hop in self.hops:
            if (hop.phase, hop.group, hop.receiver) == (phase, group, rank):
                late[hop.ended_s] = max(late[hop.ended_s], hop.late_s)
        return sum(late.values())

    @property
    def clock_error_s(self) -> float:
        """By how much clocks disagree at least: messages seen complete before they were posted."""
        return max((max(0.0, hop.packed_s - hop.ended_s) for hop in self.hops), default=0.0)

    def slowest(self) -> Hop | None:
        """The message that was waited for longest; without waits, that took longest."""
        return max(self.hops, key=lambda hop: (hop.waited_s, hop.seconds), default=None)

    def _hops(self) -> Iterable[Hop]:
        # Ranks of a ring post in one order, so the n-th message of a kind between two ranks is the
        # same one in both traces.
        posts: dict[tuple[object, ...], list[Event]] = defaultdict(list)
        waits: dict[tuple[object, ...], list[tuple[Event, Leg]]] = defaultdict(list)
        for e in self.events:
            for leg in e.legs:
                ends = (e.rank, leg.peer) if leg.sending else (leg.peer, e.rank)
                if e.name == "post":
                    posts[leg.sending, e.group, e.phase, leg.kind, *ends].append(e)
                elif e.name == "wait" and not leg.sending:
                    waits[e.group, e.phase, leg.kind, *ends].append((e, leg))
        for route, arrivals in waits.items():
            messages = zip(posts[True, *route], posts[False, *route], arrivals, strict=False)
            for source, post, (wait, leg) in messages:
                yield Hop(
                    phase=wait.phase,
                    group=wait.group,
                    step=wait.step,
                    sender=leg.peer,
                    receiver=wait.rank,
                    kind=leg.kind,
                    bytes=leg.bytes,
                    packed_s=source.start_s,
                    began_s=max(source.end_s, post.end_s),
                    ended_s=wait.end_s,
                    waited_s=wait.seconds,
                    late_s=min(max(source.end_s - wait.start_s, 0.0), wait.seconds),
                )
