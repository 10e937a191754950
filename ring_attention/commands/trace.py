# SPDX-License-Identifier: BSD-3-Clause
"""Says what the ranks of a traced run did when: overlap, imbalance, the slowest hop, a picture.

Run a job with RING_ATTENTION_TRACE=FOLDER (or inside ring_attention.trace.record(FOLDER)) on every
rank; the folder then holds one Chrome trace per rank, for Perfetto and chrome://tracing too.

overlap    of the time with messages under way, the part hidden behind computing
waiting    of the time in the ring's calls
late       the part of the waiting before the other end had posted: imbalance, not the wire
"""

import argparse
import sys
from pathlib import Path

from ..timeline import Timeline
from ..trace_files import read


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what RING_ATTENTION_TRACE was")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="where to draw ranks x time (default FOLDER/timeline.png; .svg and .pdf too)",
    )
    parser.add_argument("--no-picture", action="store_true", help="print only")


def run(args: argparse.Namespace) -> int:
    try:
        timeline = read(args.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(timeline))
    if args.no_picture:
        return 0
    try:
        from ..timeline_picture import draw
    except ImportError:
        print(
            "python -m ring_attention trace: expected matplotlib for the picture, found none; "
            "pip install matplotlib, or pass --no-picture",
            file=sys.stderr,
        )
        return 2
    path = args.picture or args.folder / "timeline.png"
    draw(timeline, path)
    print(f"\npicture: {path}")
    return 0


def report(timeline: Timeline) -> str:
    """The tables that people read."""
    lines = []
    for group in sorted({group for group, _ in timeline.ranks}):
        ranks = [rank for g, rank in timeline.ranks if g == group]
        for phase in ("forward", "backward"):
            shares = [timeline.share(phase, group, rank) for rank in ranks]
            if not any(share.ring_s for share in shares):
                continue
            lines += [
                f"group {group!r}, {phase}: imbalance of computing (largest over mean) "
                f"{timeline.imbalance(phase, group):.3f}",
                "  rank   compute s    post s   transfer s    wait s    late s   overlap   waiting",
            ]
            for rank, share in zip(ranks, shares, strict=True):
                lines.append(
                    f"  {rank:4d} {share.compute_s:11.4f} {share.post_s:9.4f} "
                    f"{share.transfer_s:12.4f} {share.wait_s:9.4f} "
                    f"{timeline.late_s(phase, group, rank):9.4f} {100 * share.overlap:8.1f}% "
                    f"{100 * share.waiting:8.1f}%"
                )
    hop = timeline.slowest()
    if hop is not None:
        rate = f", {8e-6 * hop.bytes / hop.seconds:.0f} Mbit/s" if hop.seconds else ""
        lines.append(
            f"slowest hop: {hop.phase} step {hop.step} of group {hop.group!r}, {hop.kind} from "
            f"rank {hop.sender} to {hop.receiver}: {hop.bytes / 1e6:.2f} MB in {hop.seconds:.4f} s"
            f"{rate}, waited {hop.waited_s:.4f} s, {hop.late_s:.4f} s of it for its sender to post"
        )
    lines.append(
        "clocks: one machine, exact"
        if timeline.hosts == 1
        else f"clocks: the wall clocks of {timeline.hosts} machines"
    )
    if (error_s := timeline.clock_error_s) > 0:
        lines[-1] += f"; a message arrived {1e3 * error_s:.3f} ms before it was sent"
    return "\n".join(lines)
