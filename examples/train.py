# SPDX-License-Identifier: BSD-3-Clause
"""Trains a language model on one long text whose sequences are sharded over a ring of processes.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train.py
"""

import argparse
import contextlib
import functools
import math
import os
import resource
import sys
import time
from pathlib import Path

try:
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from model import ByteModel
    from muon import Muon
    from pictures import draw_loss, draw_timeline
    from proof import prove
    from ring_attention.trace import Event, record
    from text import load, unigram_bits, windows
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install '.[demo]' in the repository, or make demo, gets everything")

EMBED_DIM, HEADS = 192, 3
TOKENS_PER_STEP = 2048  # short contexts are batched
SCHEDULE = "512x100,4096x12,32768x3"
GPUS = (
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\\n"
    "                 examples/train.py --device cuda --schedule 8192x100,1048576x10"
)


def arguments() -> argparse.Namespace:
    """The command line, checked: whatever is wrong with it ends here, in one line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options], see --help", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--text", type=Path, help="a file or folder (Python's standard library)")
    parser.add_argument("--schedule", default=SCHEDULE, help=f"context x steps, ... ({SCHEDULE})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results (demo)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--check", action="store_true", help="look at the arguments only")
    args = parser.parse_args()
    if args.device == "cuda":
        parser.error("--device cuda: this release has no CUDA kernels yet")
    try:
        stages = [stage.split("x") for stage in args.schedule.split(",")]
        stages = [(int(context), int(steps)) for context, steps in stages]
        if min(min(context - 1, steps) for context, steps in stages) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"expected --schedule like {SCHEDULE} (context x steps), got {args.schedule}")
    args.contexts = [context for context, steps in stages for _ in range(steps)]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.bytes = load(args.text)
    except OSError as error:
        parser.error(str(error))
    if len(args.bytes) < max(args.contexts):
        parser.error(f"{len(args.bytes)} bytes of text, for a context of {max(args.contexts)}")
    if args.resume:
        if not (args.out / "checkpoint.pt").is_file():
            parser.error(f"--resume: there is no {args.out / 'checkpoint.pt'}; start without it")
        args.saved = torch.load(args.out / "checkpoint.pt", weights_only=True)
        if len(args.saved["history"]) >= len(args.contexts):
            parser.error(f"--resume: all {len(args.contexts)} steps are done; lengthen --schedule")
    return args


def train(model: ByteModel, args: argparse.Namespace) -> tuple[list[dict], list[Event]]:
    """Takes the schedule's steps; returns what each measured, and the last one's ring events."""
    rank, contexts = dist.get_rank(), args.contexts
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "blocks" not in name]
    optimizers = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    history: list[dict] = []
    if args.resume:
        model.load_state_dict(args.saved["model"])
        for optimizer, state in zip(optimizers, args.saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        history = args.saved["history"]
    bar = tqdm(total=len(contexts), initial=len(history), unit="step", disable=rank > 0)
    while len(history) < len(contexts):
        step, context = len(history), contexts[len(history)]
        tokens = windows(args.bytes, max(1, TOKENS_PER_STEP // context), context, seed=step)
        dist.broadcast(tokens, 0)  # the whole ring works on rank 0's batch
        start_s = time.monotonic()
        with record() as events:
            loss = model.backward(tokens)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            remaining = 1 - step / len(contexts)
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 0.1 + 0.9 * remaining)
            optimizer.step()
            optimizer.zero_grad()
        took_s = time.monotonic() - start_s
        waited_s = sum(event.end_s - event.start_s for event in events if event.name == "wait")
        bits, speed, waited = loss / math.log(2), tokens.numel() / took_s, waited_s / took_s
        history.append({"context": context, "bits": bits, "speed": speed, "waited": waited})
        bar.set_postfix_str(
            f"context {context}, {bits:.2f} bits/byte, {speed:.0f} tokens/s, {waited:.1%} waiting"
        )
        bar.update()
        if rank == 0 and (step + 1 == len(contexts) or contexts[step + 1] != context):
            state = {"model": model.state_dict(), "history": history}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, args.out / "checkpoint.new")
            (args.out / "checkpoint.new").replace(args.out / "checkpoint.pt")
    bar.close()
    return history, events


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
        if rank > 0:  # rank 0 speaks for all about bad arguments
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        args = arguments()
    if args.check:
        return
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # started without torchrun: a world of one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    say = functools.partial(print, flush=True) if rank == 0 else (lambda *_: None)

    torch.manual_seed(0)
    model = ByteModel(EMBED_DIM, HEADS, dist.group.WORLD)
    parameters, entropy = sum(p.numel() for p in model.parameters()), unigram_bits(args.bytes)
    say(f"{len(args.bytes):,} bytes of text, {parameters:,} parameters, {ranks} ranks\n")
    tokens = windows(args.bytes, 1, min(1024, max(args.contexts)), seed=0)
    dist.broadcast(tokens, 0)
    say(f"Proof: {ranks} ranks on {tokens.numel()} tokens against one process")
    say(prove(model, tokens), "\n")

    start_s, start_bytes = time.monotonic(), resident_bytes()
    history, events = train(model, args)
    took_s = time.monotonic() - start_s

    gathered = [None] * ranks if rank == 0 else None
    dist.gather_object((start_bytes, resident_bytes(), events), gathered)
    dist.destroy_process_group()
    if rank > 0:
        return
    before, peaks, timelines = zip(*gathered, strict=True)
    context = history[-1]["context"]
    draw_loss(history, entropy, args.out / "loss.png")
    draw_timeline(timelines, f"The ring in one step, {context:,} tokens", args.out / "timeline.png")
    last = [now for now in history if now["context"] == context]
    bits, waited = (sum(now[what] for now in last) / len(last) for what in ("bits", "waited"))
    peak = " and ".join(f"{peak / 1e9:.2f}" for peak in peaks)
    say(f"""
Trained in {took_s:.0f} s to {bits:.2f} bits per byte ({entropy:.2f} for counting single bytes)
  context      {context:,} tokens in one sequence, on {ranks} ranks
  peak memory  {peak} GB per rank, everything included ({max(before) / 1e9:.2f} before training);
               the N x N scores of a single layer would take {context**2 * HEADS * 4 / 1e9:.1f} GB
  exposed      {waited:.1%} of the time was spent waiting for blocks and gradients of the ring
  results      {args.out}/loss.png, timeline.png and checkpoint.pt (--resume goes on from it)
  on GPUs      {GPUS}
               (untried, as several CPU machines are: a GPU ran the package's tests, not this)""")


def resident_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
