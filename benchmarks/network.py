# SPDX-License-Identifier: BSD-3-Clause
"""The ring over links of limited bandwidth: when does communication cost nothing?

    python benchmarks/network.py                              # P = 2, the tables
    python benchmarks/network.py --picture network.svg        # and as a picture
    python benchmarks/network.py --ranks 4 --mbit 200 --tokens 1024
                                              # one length: who waits for whom, bytes per link

Ranks are gloo processes of one thread, each in a network namespace, joined by links that `tc tbf`
bounds in both directions. Every round runs a call twice: as it is, and with messages that are
packed but never sent, so that folds read the last ones' bytes. Their difference is what
communication costs: waiting (the worst rank's share of its time), and the CPU time that gloo and
the kernel's network take from folds (theft; both ranks together, of the calls' CPU time).

Predicted is the shard from which every hop is hidden behind the folds that hide it. A hop carries
bytes like c, tokens per rank, and its folds take time like c^2, so a call without messages says of
which c that holds: c times what the hop that needs most would take over its folds. A link carries W
bytes/s in one direction, and moving a byte takes CPU time from the folds (theft), which hides as
much; both are measured on idle links. For whole blocks that is the planner's closed form,

    forward   c >= (G/H) (e/2) F (1/W - 2s)     e bytes per element of K/V, F useful FLOP/s of a
    backward  c >= (G/H) (e+4)/5 F (1/W - 2s)   rank's folds, s seconds taken per byte sent or
                                                received; twice that for balanced causal masks

with two terms that it leaves out: the own block, which hides all hops between two ranks, folds at a
rate of its own (a causal one has more diagonal tiles), and backward it is split between two hops.
Measured is where waiting ends, as the shards that wait have it: c times a hop's time over that of
the folds that hide it, of the hop that is worst. The time of a call is that of the planner's
simulation of its ranks, with the rate of folds in calls without messages.
Needs Linux, root and iproute2; says why where it cannot.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from subprocess import PIPE
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ring_attention as ra
from links import Links, Unavailable
from ring_attention import trace
from ring_attention.commands.trace import report
from ring_attention.groups import transport_of
from ring_attention.ring import Pending
from ring_attention.timeline import Timeline
from ring_attention.trace_files import Writer, read

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKS: dict[str, ra.Mask] = {"full": ra.Full(), "causal": ra.Causal()}
DIRECTIONS = ("forward", "backward")
# Lengths at which the rate of the folds is measured, and shards as shares of the break-even.
RATE_TOKENS = (256, 512, 1024, 2048, 4096)
SHARES = (0.5, 0.75, 1.0, 1.35)
# A hop that is waited for no longer than this share of a call counts as hidden.
HIDDEN = 0.03


@dataclass(frozen=True)
class Shape:
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int


# --- The ranks: commands in, results out, a JSON line each ----------------------------------------


class _Unsent(Pending):
    def wait(self) -> None:
        return None


class Rank:
    """One rank's side: what the launcher asks for by name."""

    def __init__(self, rank: int, size: int, store: str, shape: Shape) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        self.size, self.rank, self.shape = size, rank, shape
        self.group = dist.group.WORLD
        self.transport: Any = transport_of(self.group)
        self.post: Callable[..., Pending] = self.transport.post

    def link(self, nbytes: int) -> dict[str, float]:
        """Bytes/s to the next rank while as many come from the one before, after a pause.

        And CPU seconds per byte sent or received.
        """
        out, into = (torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2))
        rates, taken = [], []
        for _ in range(8):
            dist.barrier()
            time.sleep(0.05)
            dist.barrier()
            start_s, cpu_s = time.monotonic(), time.process_time()
            works = [
                dist.irecv(into, (self.rank - 1) % self.size),
                dist.isend(out, (self.rank + 1) % self.size),
            ]
            for work in works:
                work.wait()
            rates.append(nbytes / (time.monotonic() - start_s))
            taken.append((time.process_time() - cpu_s) / (2 * nbytes))
        return {"bytes_s": median(rates[1:]), "cpu_s_per_byte": median(taken[1:])}

    def _call(self, mask: str, tokens: int, direction: str) -> Callable[[], Any]:
        shape, layout = self.shape, ra.Zigzag(tokens * self.size, self.size)
        gen = torch.Generator().manual_seed(self.rank)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        q, k, v, dout = (
            torch.randn(1, h, tokens, shape.head_dim, generator=gen).to(DTYPES[shape.dtype])
            for h in heads
        )
        made = ra.plan(MASKS[mask], layout, group=self.group)
        ra.agree(made, self.group, q, k, v)
        if direction == "forward":
            return lambda: ra.attention(q, k, v, plan=made, group=self.group)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = ra.attention(q, k, v, plan=made, group=self.group)
        assert isinstance(out, Tensor)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    def run(
        self,
        mask: str,
        tokens: int,
        direction: str,
        rounds: int,
        sending: list[bool],
        folder: str | None,
    ) -> dict[str, Any]:
        """Times a call, with and without its messages sent."""
        call = self._call(mask, tokens, direction)
        taken, kept = [], []
        for turn in range(1 + rounds):
            for send in (True, False) if turn == 0 else sending:
                self.transport.post = self.post if send else lambda messages: _Unsent()
                dist.barrier()
                cpu_s, start_s = time.process_time(), time.monotonic()
                with trace.record() as events:
                    call()
                end_s = time.monotonic()
                if turn and send:
                    kept += events
                waits = [e for e in events if e.name == "wait"]
                taken.append(
                    {
                        "turn": turn,
                        "sending": send,
                        "start_s": start_s,
                        "end_s": end_s,
                        "cpu_s": time.process_time() - cpu_s,
                        "bytes": sum(e.bytes for e in events if e.name == "post"),
                        "posted_s": [e.end_s for e in events if e.name == "post"],
                        "arrived_s": [e.end_s for e in waits],
                        "hops": [
                            {
                                "bytes": max(
                                    sum(leg.bytes for leg in e.legs if leg.sending == way)
                                    for way in (True, False)
                                ),
                                "moved": e.bytes,
                                "hiding_s": sum(
                                    c.seconds
                                    for c in events
                                    if c.name == "compute" and c.step == e.step
                                ),
                            }
                            for e in waits
                        ],
                    }
                    | {
                        name: sum(e.seconds for e in events if e.name == name)
                        for name in ("compute", "post", "wait")
                    }
                )
        self.transport.post = self.post
        if folder is not None:
            writer = Writer(folder)
            for event in kept:
                writer.add(event)
            writer.close()
        return {"runs": [run for run in taken if run["turn"]]}


def serve(rank: int, size: int, store: str, shape: Shape) -> None:
    """Answers the launcher until its pipe closes."""
    served = Rank(rank, size, store, shape)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(served, name)(**arguments)), flush=True)
    dist.destroy_process_group()


class Ring:
    """The launcher's side: all ranks of a ring, on links it can shape."""

    def __init__(self, links: Links, size: int, shape: Shape, folder: str) -> None:
        self.links, self.size, self.shape, self.folder = links, size, shape, folder
        settings = json.dumps([size, f"{folder}/store", asdict(shape)])
        self.ranks = [
            links.start(
                rank,
                [sys.executable, __file__, "--serve", str(rank), settings],
                stdin=PIPE,
                stdout=PIPE,
            )
            for rank in range(size)
        ]

    def ask(self, name: str, **arguments: Any) -> list[Any]:
        """All ranks' answers to a command."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([name, arguments]) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        if not all(answers):
            raise RuntimeError("a rank died; its error is above")
        return [json.loads(answer) for answer in answers]

    def link(self, mbit: float) -> "Shaped":
        """Shapes the links; what the slowest carries then, of payload, and what that takes."""
        self.links.shape(mbit)
        answers = self.ask("link", nbytes=int(mbit * 1e6 / 8 * 0.06))
        taken = mean(answer["cpu_s_per_byte"] for answer in answers)
        return Shaped(min(answer["bytes_s"] for answer in answers), taken)

    def run(
        self,
        direction: str,
        mask: str,
        tokens: int,
        rounds: int,
        *,
        sending: bool = True,
        folder: Path | None = None,
    ) -> "Measured":
        order = [True, False] if sending else [False]
        answers = self.ask(
            "run",
            mask=mask,
            tokens=tokens,
            direction=direction,
            rounds=rounds,
            sending=order,
            folder=folder and str(folder),
        )
        turns = list(zip(*(answer["runs"] for answer in answers), strict=True))
        return Measured.of(tokens, turns)

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(timeout=60)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@contextmanager
def ring(size: int, shape: Shape) -> Iterator[Ring]:
    """A ring of ranks on links; nothing of it is left behind."""
    with Links(size) as links, tempfile.TemporaryDirectory() as folder:
        made = Ring(links, size, shape, folder)
        try:
            yield made
            made.close()
        finally:
            made.kill()


# --- What is made of it ---------------------------------------------------------------------------


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
        waiting: share of the call, of the rank that waits most.
        exposed: time that a hop took from both ends having posted, over that of the folds that hide
            it, of that rank's worst hop; at most 1 if all are hidden.
        theft_s: CPU seconds more than without messages.
        hops: of every hop; its folds without messages.
        folding_s: all folds of a call without messages, the mean of the ranks.
    """

    tokens: int
    alone_s: float
    seconds: float
    waiting: float
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
        for ranks in turns:
            sending = ranks[0]["sending"]
            seconds = max(r["end_s"] for r in ranks) - min(r["start_s"] for r in ranks)
            seen["cpu", sending].append(sum(r["cpu_s"] for r in ranks))
            seen["seconds", sending].append(seconds)
            if sending:
                most = max(ranks, key=lambda r: r["wait"])
                # A hop begins when both of its ends have posted.
                begun = map(max, zip(*(r["posted_s"] for r in ranks), strict=False))
                seen["waiting"].append(most["wait"] / seconds)
                exposed.append(
                    [
                        (end_s - start_s) / max(hop["hiding_s"], 1e-9)
                        for start_s, end_s, hop in zip(
                            begun, most["arrived_s"], most["hops"], strict=False
                        )
                    ]
                )
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
    exposed = [p.tokens * p.exposed for p in points if p.waiting > HIDDEN]
    return median(exposed) if exposed else math.nan


def sweep(ring: Ring, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Waiting and theft around the predicted break-even of every mask, direction, bandwidth."""
    rows = []
    for mask in options.mask:
        for direction in options.direction:
            first = [
                ring.run(direction, mask, tokens, 1, sending=False)
                for tokens in RATE_TOKENS
                if tokens <= options.max_tokens
            ]
            for mbit in options.mbit:
                link = ring.link(mbit)
                expected = predicted(first, link)
                lengths = [max(32, round(share * expected / 32) * 32) for share in SHARES]
                points = [
                    ring.run(direction, mask, tokens, options.rounds)
                    for tokens in lengths
                    if tokens <= options.max_tokens
                ]
                if points:  # the folds of these minutes
                    expected = predicted(points, link)
                rows.append(
                    {
                        "ranks": ring.size,
                        "shape": asdict(ring.shape),
                        "mask": mask,
                        "direction": direction,
                        "mbit": mbit,
                        "link": asdict(link),
                        "predicted_tokens": expected,
                        "measured_tokens": measured_break_even(points),
                        "points": [asdict(point) for point in points],
                    }
                )
                print_row(rows[-1])
    return rows


HEADER = (
    "direction mask    Mbit  MB/s  break-even predicted measured   ratio | "
    "tokens  of predicted   alone s    ring s    ratio  simulated s  ring/simulated  waiting   "
    "theft  CPU s/GB"
)


def print_row(row: dict[str, Any]) -> None:
    """One bandwidth, a line per shard length."""
    link = Shaped(**row["link"])
    expected, found = row["predicted_tokens"], row["measured_tokens"]
    start = (
        f"{row['direction']:9} {row['mask']:7}{row['mbit']:5g}{link.bytes_s / 1e6:6.1f}"
        f"{expected:21.0f}{found:9.0f}{expected / found:8.2f} |"
    )
    for point in row["points"]:
        p = Measured(**point | {"hops": [Hop(**hop) for hop in point["hops"]]})
        guess_s = simulated(row, p, link)
        print(
            f"{start}{p.tokens:7d}{p.tokens / expected:14.2f}{p.alone_s:10.4f}{p.seconds:10.4f}"
            f"{p.seconds / p.alone_s:9.3f}{guess_s:13.4f}{p.seconds / guess_s:16.2f}"
            f"{100 * p.waiting:8.1f}%"
            f"{100 * p.theft_s / p.alone_s / row['ranks']:7.1f}%"
            f"{p.theft_s / (p.sent_bytes / 1e9):10.2f}",
            flush=True,
        )
        start = " " * (len(start) - 1) + "|"
    if not row["points"]:
        print(f"{start} every shard is above --max-tokens")


def structure(ring: Ring, options: argparse.Namespace) -> None:
    """Who waits for whom, and what every pair of ranks exchanges; of all rounds."""
    for mask in options.mask:
        for direction in options.direction:
            folder = Path(ring.folder) / f"{direction}-{mask}"
            link, tokens = ring.link(options.mbit[0]), options.tokens
            point = ring.run(direction, mask, tokens, options.rounds, folder=folder)
            print(
                f"\n{direction}, {mask}, {tokens} tokens per rank, {options.mbit[0]:g} Mbit "
                f"({link.bytes_s / 1e6:.1f} MB/s): {point.seconds:.3f} s with messages, "
                f"{point.alone_s:.3f} without; per call:"
            )
            timeline = read(folder)
            print_pairs(timeline, ring.size, options.rounds)
            print(report(timeline))
            if options.trace:
                shutil.copytree(folder, options.trace / folder.name, dirs_exist_ok=True)


def print_pairs(timeline: Timeline, size: int, rounds: int) -> None:
    sent: dict[tuple[int, int], float] = defaultdict(float)
    waited: dict[tuple[int, int], float] = defaultdict(float)
    for hop in timeline.hops:
        sent[hop.sender, hop.receiver] += hop.bytes / 1e6 / rounds
        waited[hop.receiver, hop.sender] += hop.waited_s / rounds
    print("  MB sent" + "".join(f"   to {r}" for r in range(size)) + "     waited s", end="")
    print("".join(f"  for {r}" for r in range(size)))
    for rank in range(size):
        cells = [f"{sent[rank, other]:7.2f}" for other in range(size)]
        waits = [f"{waited[rank, other]:7.3f}" for other in range(size)]
        print(f"  rank {rank} {''.join(cells)}     rank {rank}   {''.join(waits)}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Waiting against shard length, a panel per direction and mask, a colour per bandwidth."""
    from matplotlib.figure import Figure

    kinds = sorted({(row["direction"], row["mask"]) for row in rows}, reverse=True)
    speeds = sorted({row["mbit"] for row in rows})
    colors = dict(
        zip(speeds, ("#d1495b", "#f2803a", "#4c9f70", "#2f6690", "#8d5a97"), strict=False)
    )
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for panel, kind in zip(panels, kinds, strict=False):
        for row in sorted(rows, key=lambda row: row["mbit"]):
            if (row["direction"], row["mask"]) != kind:
                continue
            tokens = [point["tokens"] for point in row["points"]]
            waiting = [100 * point["waiting"] for point in row["points"]]
            color = colors[row["mbit"]]
            panel.plot(tokens, waiting, ".-", color=color, label=f"{row['mbit']:g} Mbit/s")
            panel.axvline(row["predicted_tokens"], color=color, lw=1, ls=":")
        panel.axhline(100 * HIDDEN, color="#9aa5b1", lw=1)
        panel.set_xscale("log")
        panel.set_title(f"{kind[0]}, {kind[1]}", loc="left", weight="bold")
        panel.set_xlabel("tokens per rank")
        panel.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("measured: % of a call waiting")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="outside lower center")
    figure.suptitle("Waiting; dotted: the predicted break-even", x=0.01, ha="left")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="P")
    parser.add_argument("--mbit", type=float, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up (default 3)")
    parser.add_argument("--tokens", type=int, help="one shard length, without a sweep")
    parser.add_argument("--max-tokens", type=int, default=8192, help="per rank (default 8192)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of all rows of that file")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="keep traces of --tokens here")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        size, store, shape = json.loads(options.serve[1])
        return serve(int(options.serve[0]), size, store, Shape(**shape))

    shape = Shape(options.dtype, options.heads, options.kv_heads, options.head_dim)
    print(
        f"{date.today()}, torch {torch.__version__}, kernels: {ra.isa_name()}, "
        f"{len(os.sched_getaffinity(0))} cores, {options.ranks} ranks of one thread, {shape}, "
        f"{options.rounds} rounds. All measured, but what is called predicted."
    )
    try:
        with ring(options.ranks, shape) as ranks:
            if options.tokens:
                return structure(ranks, options)
            print(HEADER)
            rows = sweep(ranks, options)
    except Unavailable as why:
        print(f"skipped: {why}")
        return None
    if options.json:
        if options.json.exists():
            rows = json.loads(options.json.read_text()) + rows
        options.json.write_text(json.dumps(rows, indent=1))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
