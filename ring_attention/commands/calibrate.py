# SPDX-License-Identifier: BSD-3-Clause
"""Measures kernels, memory and the link between two local processes; writes a file of figures.

    python -m ring_attention calibrate figures.json
    python -m ring_attention plan --tokens 64K --gpus 2 --device figures.json

A rank is one process with --threads threads on the CPU; the link is gloo between two processes of
this machine. Measure while the machine is otherwise idle: it takes seconds.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..figures import Device, Link, Machine, save
from ..function import attention
from ..mask import Full
from ..ops import isa_name

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the JSON to write")
    add("--threads", type=int, default=1, metavar="N", help="of a rank (default 1)")
    add("--heads", type=int, default=4, metavar="H", help="query heads (default 4)")
    add("--kv-heads", type=int, metavar="G", help="K/V heads (default: as --heads)")
    add("--head-dim", type=int, default=64, metavar="D", help="default 64")
    add("--tokens", type=int, default=2048, metavar="N", help="of a block (default 2048)")
    add("--dtype", nargs="+", choices=_DTYPES, default=["float32", "bfloat16"])
    add("--rounds", type=int, default=5, metavar="N", help="the median of so many (default 5)")
    add("--megabytes", type=int, default=32, metavar="N", help="of a message (default 32)")


def _seconds(call: Callable[[], object], rounds: int) -> float:
    """The median over the rounds, after one to warm up."""
    taken = []
    for _ in range(rounds + 1):
        start_s = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start_s)
    return median(taken[1:])


def _kernels(args: argparse.Namespace, name: str, tokens: int) -> tuple[float, float]:
    """Seconds of a forward and of its backward, full mask."""
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads

    def tensor(heads: int) -> torch.Tensor:
        made = torch.randn(1, heads, tokens, args.head_dim).to(_DTYPES[name])
        return made.requires_grad_()

    q, k, v = tensor(args.heads), tensor(kv_heads), tensor(kv_heads)
    with torch.no_grad():
        forward_s = _seconds(lambda: attention(q, k, v, mask=Full()), args.rounds)
    out = attention(q, k, v, mask=Full())
    assert isinstance(out, torch.Tensor)
    dout = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return forward_s, _seconds(backward, args.rounds)


def _memory_bytes_per_s(rounds: int) -> float:
    source = torch.ones(1 << 26, dtype=torch.uint8)
    into = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: into.copy_(source), rounds)


def _exchange(rank: int, store: str, megabytes: int, rounds: int) -> None:
    """Both ranks send and receive at once; rank 0 writes what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def exchange(mine: torch.Tensor, other: torch.Tensor) -> None:
        # Receives first, as a ring posts them: gloo's two directions would take turns.
        for work in (dist.irecv(other, 1 - rank), dist.isend(mine, 1 - rank)):
            assert work is not None
            work.wait()

    small = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    large = torch.zeros(2, megabytes << 20, dtype=torch.uint8).unbind()
    dist.barrier()
    latency_s = _seconds(lambda: exchange(*small), 20 * rounds)
    dist.barrier()
    cpu_s = time.process_time()
    message_s = _seconds(lambda: exchange(*large), rounds)
    cpu_s = (time.process_time() - cpu_s) / (rounds + 1)
    if rank == 0:
        Path(f"{store}.txt").write_text(f"{latency_s} {message_s} {cpu_s}")
    dist.barrier()
    dist.destroy_process_group()


def _link(args: argparse.Namespace) -> tuple[Link, float]:
    """The link, and the CPU seconds that the transport takes per byte sent or received."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(_exchange, (store, args.megabytes, args.rounds), nprocs=2)
        latency_s, message_s, cpu_s = map(float, Path(f"{store}.txt").read_text().split())
    nbytes = args.megabytes << 20
    rate = nbytes / max(message_s - latency_s, 1e-9)
    return Link("gloo, two processes", rate, latency_s), cpu_s / (2 * nbytes)


def run(args: argparse.Namespace) -> int:
    if not args.file.absolute().parent.is_dir():
        print(f"ring_attention calibrate: no folder for {str(args.file)!r}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        launch_s = _kernels(args, args.dtype[0], 16)[0]
        rates: dict[str, tuple[float, float]] = {}
        for name in args.dtype:
            flops = 4.0 * args.tokens**2 * args.head_dim * args.heads
            forward_s, backward_s = _kernels(args, name, args.tokens)
            rates[name] = (
                flops / max(forward_s - launch_s, 1e-9),
                2.5 * flops / max(backward_s - launch_s, 1e-9),
            )
        memory = _memory_bytes_per_s(args.rounds)
        link, cpu_s_per_byte = _link(args)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    ranks = max(1, (os.cpu_count() or 1) // args.threads)
    device = Device(
        f"{platform.machine()} {isa_name()}, {args.threads} thread(s)",
        {name: forward for name, (forward, _) in rates.items()},
        {name: backward for name, (_, backward) in rates.items()},
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks,
        memory,
        launch_s,
        cpu_s_per_byte,
    )
    save(args.file, Machine(device, link), measured=str(date.today()), torch=torch.__version__)
    for name, (forward, backward) in rates.items():
        print(f"{name:9} forward {forward / 1e9:.1f} GFLOP/s, backward {backward / 1e9:.1f}")
    print(f"call      {launch_s * 1e6:.0f} us, memory {memory / 1e9:.1f} GB/s")
    print(
        f"link      {link.bytes_per_s / 1e9:.2f} GB/s each way, {link.latency_s * 1e6:.0f} us, "
        f"{1e9 * cpu_s_per_byte:.2f} s of CPU per GB sent or received"
    )
    print(f"written to {args.file}: pass it as --device")
    return 0
