# SPDX-License-Identifier: BSD-3-Clause
"""What timed calls say of the shard from which communication costs nothing; see network.py."""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

import ring_attention as ra
from network_rank import DTYPES, MASKS, Shape

# A hop that is waited for no longer than this share of a call counts as hidden.
HIDDEN = 0.03


@dataclass(frozen=True)
class Shaped:
    """A link: payload in one direction, and CPU seconds per byte sent or received."""

    bytes_s: float
    cpu_s_per_byte: float


@dataclass(frozen=True)
class Hop:
    """Of a call without messages, the larger of the ranks' bytes, the mean of their folds.

    Attributes:
        nbytes: in the busier direction.
        moved: sent and received by a rank.
        hiding_s: of the folds that hide it.
    """

    nbytes: float
    moved: float
    hiding_s: float

    def over(self, link: Shaped) -> float:
        """Seconds on a link, less what moving the bytes adds to the folds that hide it."""
        return self.nbytes / link.bytes_s - self.moved * link.cpu_s_per_byte


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds; of ranks the slowest, CPU time and bytes their sum.

    Attributes:
        alone_s, seconds: a call without and with its messages.
        waiting: share of the call, of the rank that waits most, for whatever it waits.
        link_waiting: the same had both ends of every hop posted at the same time: what hops took
            longer than the folds that hide them. The rest is waiting for a rank that was held up.
        exposed: time that a hop took over that of the folds that hide it, of the worst hop; 1 if
            all are hidden.
        theft_s: CPU seconds more than without messages.
        hops: of every hop; its folds without messages.
        folding_s: all folds of a call without messages, the mean of the ranks.
    """

    tokens: int
    alone_s: float
    seconds: float
    waiting: float
    link_waiting: float
    exposed: float
    theft_s: float
    sent_bytes: int
    hops: list[Hop]
    folding_s: float

    def break_even(self, link: Shaped) -> float:
        """Predicted: the tokens per rank from which the hop that needs most is hidden."""
        return self.tokens * max((hop.over(link) / hop.hiding_s for hop in self.hops), default=0.0)

    @classmethod
    def of(cls, tokens: int, turns: list[tuple[dict[str, Any], ...]]) -> "Measured":
        seen: dict[Any, list[float]] = defaultdict(list)
        exposed: list[list[float]] = []  # of every hop
        hops: list[list[Hop]] = []
        packing = _packing_s(turns)
        for ranks in turns:
            sending = ranks[0]["sending"]
            seconds = max(r["end_s"] for r in ranks) - min(r["start_s"] for r in ranks)
            seen["cpu", sending].append(sum(r["cpu_s"] for r in ranks))
            seen["seconds", sending].append(seconds)
            if sending:
                seen["waiting"].append(max(r["wait"] for r in ranks) / seconds)
                over = _over(ranks, packing)
                seen["link"].append(sum(over_s for over_s, _ in over) / seconds)
                exposed.append([1 + over_s / max(hiding_s, 1e-9) for over_s, hiding_s in over])
                seen["bytes"].append(sum(r["bytes"] for r in ranks) / 2)
            else:
                seen["folding"].append(mean(r["compute"] for r in ranks))
                hops.append(
                    [
                        Hop(
                            max(hop["bytes"] for hop in same),
                            max(hop["moved"] for hop in same),
                            max(mean(hop["hiding_s"] for hop in same), 1e-9),
                        )
                        for same in zip(*(r["hops"] for r in ranks), strict=False)
                    ]
                )
        middle = {key: median(values) for key, values in seen.items()}
        return cls(
            tokens=tokens,
            alone_s=middle["seconds", False],
            seconds=middle.get(("seconds", True), math.nan),
            waiting=middle.get("waiting", math.nan),
            link_waiting=middle.get("link", math.nan),
            # The medians' maximum: that of every round would be of whichever hop was held up.
            exposed=max(map(median, zip(*exposed, strict=False)), default=math.nan),
            theft_s=middle.get(("cpu", True), math.nan) - middle["cpu", False],
            sent_bytes=int(middle.get("bytes", 0)),
            hops=[
                Hop(same[0].nbytes, same[0].moved, median(hop.hiding_s for hop in same))
                for same in zip(*hops, strict=False)
            ],
            folding_s=middle["folding"],
        )


def _over(ranks: tuple[dict[str, Any], ...], packing: list[float]) -> list[tuple[float, float]]:
    """Of a call, for every hop: what it took longer than the folds that hide it, and these.

    It begins when both ends have packed (posting may be held up after that), and ends for the rank
    that waits for it longest. Of the folds the mean, as that rank is the one that folded faster.
    """
    posts = zip(*(r["posts"] for r in ranks), strict=False)
    arrived = zip(*(r["arrived_s"] for r in ranks), strict=False)
    hops = zip(*(r["hops"] for r in ranks), strict=False)
    over = []
    for same, ends, sides, packed_s in zip(posts, arrived, hops, packing, strict=False):
        begun_s = max(start_s for start_s, _ in same) + packed_s
        hiding_s = mean(side["hiding_s"] for side in sides)
        waited_s, end_s = max(zip((side["waited_s"] for side in sides), ends, strict=True))
        over.append((min(waited_s, max(0.0, end_s - begun_s - hiding_s)), hiding_s))
    return over


def _packing_s(turns: list[tuple[dict[str, Any], ...]]) -> list[float]:
    """What packing the messages of every hop takes: posting them, in calls that do not send."""
    posts = [r["posts"] for ranks in turns if not ranks[0]["sending"] for r in ranks]
    return [median(end - start for start, end in same) for same in zip(*posts, strict=False)]


def predicted(points: list[Measured], link: Shaped) -> float:
    """The break-even, from calls of about its length."""
    each = {point.tokens: point.break_even(link) for point in points}
    tokens = 1024.0
    for _ in range(20):
        tokens = _at(each, tokens)
    return tokens


def simulated(row: dict[str, Any], point: Measured, link: Shaped) -> float:
    """Predicted: a call with its messages, by the planner's simulation of its ranks.

    Its folds are as quick as those of calls without messages, which also say what else there is.
    """
    shape, mask, backward = Shape(**row["shape"]), MASKS[row["mask"]], row["direction"] != "forward"
    layout = ra.Zigzag(point.tokens * row["ranks"], row["ranks"])
    dtype = str(DTYPES[shape.dtype]).removeprefix("torch.")
    shapes = ra.Shapes(shape.heads, shape.kv_heads, shape.head_dim, dtype=dtype)
    pairs = sum(sum(ra.plan(mask, layout, rank=r).flops) for r in range(row["ranks"]))
    flops = shapes.flops_per_pair * pairs / row["ranks"] * (2.5 if backward else 1.0)
    rate = {dtype: flops / point.folding_s}
    device = ra.Device("measured", rate, rate, 1e12, 1e15, cpu_s_per_byte=link.cpu_s_per_byte)
    machine = ra.Machine(device, ra.Link("shaped", link.bytes_s))
    made = ra.predict(mask, layout, shapes, machine, generator="direct", traveller="kv")
    phase = made.backward if backward else made.forward
    return max(t.seconds for t in phase) + point.alone_s - point.folding_s


def _at(values: dict[int, float], tokens: float) -> float:
    lengths = sorted(values)
    for low, high in pairwise(lengths):
        if low <= tokens <= high:
            share = math.log(tokens / low) / math.log(high / low)
            return values[low] + share * (values[high] - values[low])
    return values[lengths[0] if tokens < lengths[0] else lengths[-1]]


def measured_break_even(points: list[Measured]) -> float:
    """Where waiting ends, from the shards that wait: hops grow like c, what hides them like c^2."""
    exposed = [p.tokens * p.exposed for p in points if p.link_waiting > HIDDEN]
    return median(exposed) if exposed else math.nan
