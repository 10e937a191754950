# SPDX-License-Identifier: BSD-3-Clause
"""The ring as a simulation of discrete events: the real schedules of its ranks, step by step.

Note [simulation]. A rank packs and posts, folds, and waits for what is due, as loop.py does. A
message starts when both its sides are posted. It takes its bytes over the link's rate of the
sender's way out and of the receiver's way in, each of which is busy with one message after another
(per link: a rank talks to its node and to the network at the same time), and is there a latency
after the slower of the two. With some ranks only, each is taken to be in step with its peers: their
side of a message is posted when its own is, and their ways are free. Under Ulysses the ring's
stages stand between two all-to-alls of the heads, which nothing hides.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from .costs import Costs
from .events import Event, Name, Phase
from .stages import Key, Letter, Stage


@dataclass
class Timeline:
    """What one rank does in one phase, from 0 on.

    Attributes:
        rank: in the group.
        seconds: until its last stage is over.
        compute_s: folding, with what the transport takes of it (stolen_s).
        post_s: packing.
        wait_s: nothing to compute, waiting for messages: exposed communication.
        sent_bytes, received_bytes: on the wire.
        events: as trace.record() would have them.
    """

    rank: int
    seconds: float = 0.0
    compute_s: float = 0.0
    stolen_s: float = 0.0
    post_s: float = 0.0
    wait_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    events: list[Event] = field(default_factory=list)


@dataclass
class _Message:
    """A message of which a side is posted."""

    letter: Letter
    posted_s: float
    done_s: float | None = None


class _Rank:
    def __init__(self, costs: Costs, todo: Sequence[Stage]) -> None:
        self.costs = costs
        self.todo = iter(todo)
        self.stage: Stage = Stage(0, 0)
        self.under_way: list[_Message] = []
        self.due: list[_Message] = []
        self.folded_s = -1.0  # when it began to wait, or -1
        self.timeline = Timeline(costs.plan.rank)

    def event(self, name: Name, start_s: float, end_s: float, nbytes: int = 0) -> None:
        if end_s > start_s:
            phase: Phase = "backward" if self.costs.backward else "forward"
            self.timeline.events.append(
                Event(name, phase, self.timeline.rank, self.stage.number, start_s, end_s, nbytes)
            )


class _Simulation:
    def __init__(self, costs: Sequence[Costs], todo: Sequence[Sequence[Stage]]) -> None:
        both = zip(costs, todo, strict=True)
        self.ranks = {each.plan.rank: _Rank(each, its) for each, its in both}
        self.machine = costs[0].machine
        self.whole = len(costs) == costs[0].plan.world_size
        self.posted: dict[Key, _Message] = {}
        self.free_s: dict[tuple[bool, int, str], float] = {}  # of a rank's ways: sending, link
        self.queue = [(0.0, n, rank, "next") for n, rank in enumerate(self.ranks)]
        self.number = len(self.queue)

    def run(self) -> list[Timeline]:
        while self.queue:
            now_s, _, rank, what = heapq.heappop(self.queue)
            {"next": self.next, "post": self.post, "folded": self.folded}[what](
                self.ranks[rank], now_s
            )
        assert not self.posted, "a message that nobody received"
        return [rank.timeline for rank in self.ranks.values()]

    def at(self, when_s: float, rank: _Rank, what: str) -> None:
        self.number += 1
        heapq.heappush(self.queue, (when_s, self.number, rank.timeline.rank, what))

    def next(self, rank: _Rank, now_s: float) -> None:
        stage = next(rank.todo, None)
        if stage is None:
            rank.timeline.seconds = now_s
            return
        rank.stage = stage
        rank.timeline.post_s += stage.pack_s
        rank.event("post", now_s, now_s + stage.pack_s)
        self.at(now_s + stage.pack_s, rank, "post")

    def post(self, rank: _Rank, now_s: float) -> None:
        stage = rank.stage
        for letter in stage.letters:
            message = _Message(letter, now_s)
            rank.under_way.append(message)
            if letter.sending:
                rank.timeline.sent_bytes += letter.nbytes
            else:
                rank.timeline.received_bytes += letter.nbytes
            if not self.whole:
                self.transfer(now_s, message, [(letter.sending, rank.timeline.rank)])
            elif (other := self.posted.pop(letter.key, None)) is None:
                self.posted[letter.key] = message
            else:
                source, to = letter.key[-2:]
                self.transfer(now_s, message, [(True, source), (False, to)])
                other.done_s = message.done_s
                self.go_on(self.ranks[letter.peer])
        rank.timeline.compute_s += stage.fold_s
        rank.timeline.stolen_s += stage.stolen_s
        rank.event("compute", now_s, now_s + stage.fold_s)
        self.at(now_s + stage.fold_s, rank, "folded")

    def transfer(self, now_s: float, message: _Message, ways: list[tuple[bool, int]]) -> None:
        letter = message.letter
        link = self.machine.between(*letter.key[-2:])
        takes_s = letter.nbytes / link.bytes_per_s
        end_s = now_s
        for sending, rank in ways:
            way = (sending, rank, link.name)
            self.free_s[way] = max(now_s, self.free_s.get(way, 0.0)) + takes_s
            end_s = max(end_s, self.free_s[way])
        message.done_s = end_s + link.latency_s

    def folded(self, rank: _Rank, now_s: float) -> None:
        following = rank.stage.following
        rank.due = [m for m in rank.under_way if m.letter.due < following]
        rank.under_way = [m for m in rank.under_way if m.letter.due >= following]
        rank.folded_s = now_s
        self.go_on(rank)

    def go_on(self, rank: _Rank) -> None:
        """Ends a wait once it is known when: a rank that does not wait is left alone."""
        done_s = [message.done_s for message in rank.due]
        if rank.folded_s < 0 or None in done_s:
            return
        end_s = max(rank.folded_s, *(s for s in done_s if s is not None), 0.0)
        rank.timeline.wait_s += end_s - rank.folded_s
        rank.event("wait", rank.folded_s, end_s)
        for m in rank.due:
            if m.done_s is not None:
                rank.event("transfer", m.posted_s, m.done_s, m.letter.nbytes)
        rank.folded_s, rank.due = -1.0, []
        self.at(end_s, rank, "next")


def simulate(costs: Sequence[Costs], todo: Sequence[Sequence[Stage]]) -> list[Timeline]:
    """Runs one phase of a ring.

    Args:
        costs, todo: of every rank, or of some: see the Note; their stages.
    """
    return _Simulation(costs, todo).run()
