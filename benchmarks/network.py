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
the kernel's network take from folds (theft; both ranks together, of the calls' CPU time). Waiting
"for link" is what hops took longer than the folds that hide them; the rest is for a rank that
something else on the machine held up.

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
import os
import shutil
from collections import defaultdict
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

import ring_attention as ra
from break_even import Hop, Measured, Shaped, measured_break_even, predicted, simulated
from links import Unavailable
from network_picture import draw
from network_rank import DTYPES, MASKS, Shape
from network_ring import Ring, ring
from ring_attention.commands.trace import report
from ring_attention.timeline import Timeline
from ring_attention.trace_files import read

DIRECTIONS = ("forward", "backward")
# Lengths at which the rate of the folds is measured, and shards as shares of the break-even.
RATE_TOKENS = (256, 512, 1024, 2048, 4096)
SHARES = (0.5, 0.75, 1.0, 1.35)


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
    "tokens  of predicted   alone s    ring s    ratio  simulated s  ring/simulated  waiting  "
    "for link   theft  CPU s/GB"
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
            f"{100 * p.waiting:8.1f}%{100 * p.link_waiting:9.1f}%"
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
    options = parser.parse_args()

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
