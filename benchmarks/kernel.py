# SPDX-License-Identifier: BSD-3-Clause
"""The CPU block kernels against torch's attention and against the machine's peak.

    python benchmarks/kernel.py --threads 1,2 --dtype bfloat16,float32 --head-dim 64,128

Every round runs the peak loop, our kernel and torch's one after the other, so that all three see
the same machine. Rates count the products of visible query-key pairs (forward 4 head_dim per
pair, backward 2.5 times that). Printed are the median of ours and of torch's, the largest peak,
ours as a share of it, and the median over the rounds of torch's time divided by ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attention import ops
from ring_attention.mask import Causal, Documents, Full, Mask, Window


@dataclass
class Row:
    """One line of the table; rates in GFLOP/s of visible pairs."""

    threads: int
    dtype: str
    head_dim: int
    mask: str
    direction: str
    ours: float
    torch: float
    speedup: float
    peak: float
    of_peak: float


def masks(length: int) -> dict[str, Mask]:
    sixteenth = max(length // 16, 1)
    return {
        "full": Full(),
        "causal": Causal(),
        "window": Causal() & Window(511, 0),
        "documents": Causal() & Documents([*range(0, length, sixteenth), length]),
    }


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def calls(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, name: str, mask: Mask
) -> tuple[dict[str, tuple[Callable[[], object], Callable[[], object]]], int]:
    """direction -> (ours, torch's), and the number of visible pairs of one head."""
    length, scale = q.shape[2], q.shape[3] ** -0.5
    begin, end = (x.to(torch.int32) for x in mask.intervals(length, length))
    pairs = int((end.long() - begin.long()).clamp(min=0).sum())
    ring = torch.ops.ring_attention
    out, lse = ring.forward(q, k, v, begin, end, None, scale, 0.0)

    # torch's attention has one fast mask; the others it takes as a dense boolean.
    dense = mask.dense(length, length)[:, None] if name not in ("full", "causal") else None
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def sdpa(*qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*qkv, attn_mask=dense, is_causal=name == "causal")

    graph = sdpa(*leaves)
    error = (out.float() - graph.detach().float()).abs().max().item()
    if error > 0.05:
        raise SystemExit(f"kernel.py: expected torch's result, got an error of {error} for {name}")
    forward = (lambda: ring.forward(q, k, v, begin, end, None, scale, 0.0), lambda: sdpa(q, k, v))
    backward = (
        lambda: ring.backward(dout, None, q, k, v, out, lse, begin, end, None, scale, 0.0),
        lambda: torch.autograd.grad(graph, leaves, dout, retain_graph=True),
    )
    return {"forward": forward, "backward": backward}, pairs


def measure(args: argparse.Namespace, dtype: torch.dtype, head_dim: int, name: str) -> list[Row]:
    torch.manual_seed(0)
    shape = (1, args.heads, args.length, head_dim)
    q, k, v, dout = (torch.randn(shape).to(dtype) for _ in range(4))
    directions, pairs = calls(q, k, v, dout, name, masks(args.length)[name])
    rows = []
    for direction, (ours, theirs) in directions.items():
        flops = (4 if direction == "forward" else 10) * head_dim * pairs * args.heads
        rounds = [
            (ops.peak_flops(dtype, 0.05), timed(ours), timed(theirs)) for _ in range(args.rounds)
        ]
        peak = max(r[0] for r in rounds) / 1e9
        rate = flops / 1e9 / statistics.median(r[1] for r in rounds)
        rows.append(
            Row(
                threads=torch.get_num_threads(),
                dtype=str(dtype).removeprefix("torch."),
                head_dim=head_dim,
                mask=name,
                direction=direction,
                ours=round(rate, 1),
                torch=round(flops / 1e9 / statistics.median(r[2] for r in rounds), 1),
                speedup=round(statistics.median(r[2] / r[1] for r in rounds), 2),
                peak=round(peak, 1),
                of_peak=round(rate / peak, 3),
            )
        )
    return rows


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def arguments() -> argparse.Namespace:
    def comma(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=comma, default=["1", "2"])
    parser.add_argument("--dtype", type=comma, default=["bfloat16", "float32"])
    parser.add_argument("--head-dim", type=comma, default=["64", "128"])
    parser.add_argument("--mask", type=comma, default=list(masks(16)))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    print(
        f"{processor()}, {ops.isa_name()}, torch {torch.__version__}, "
        f"B=1 H={args.heads} N={args.length}, {args.rounds} rounds, GFLOP/s\n"
    )
    print(
        "threads  dtype     D    mask       direction    ours    torch  speed-up    peak  of peak"
    )
    rows: list[Row] = []
    for threads in args.threads:
        torch.set_num_threads(int(threads))
        for dtype in args.dtype:
            for head_dim in args.head_dim:
                for name in args.mask:
                    for row in measure(args, getattr(torch, dtype), int(head_dim), name):
                        rows.append(row)
                        print(
                            f"{row.threads:<8} {row.dtype:<9} {row.head_dim:<4} {row.mask:<10} "
                            f"{row.direction:<9} {row.ours:7.1f}  {row.torch:7.1f} "
                            f"{row.speedup:8.2f}x {row.peak:7.1f}  {row.of_peak:8.0%}",
                            flush=True,
                        )
    if args.json:
        machine = {"processor": processor(), "isa": ops.isa_name(), "torch": torch.__version__}
        args.json.write_text(
            json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
