# SPDX-License-Identifier: BSD-3-Clause
"""Checks the kernels of this machine against float64 and times them: a table for an issue report.

    python -m ring_attention selftest --device cuda
    python -m ring_attention selftest --device cpu --dtype float32 --no-timings

Every line is a dtype and a pair of head dims. "worst" is the largest error of out, lse and all
gradients over the cases (masks, lengths, grouped heads, softcap, sinks, few queries, blocks folded
one by one), as a share of what is allowed: twice the error of the same formula in plain float32
torch, rounded to the dtype once, and a few roundings more. "repeat" says whether a second run gave
the same bits. Rates are TFLOP/s of visible query-key pairs, causal; beside them torch's
scaled_dot_product_attention.

The exit code is 1 if anything is wrong.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, ops, reference
from ..mask import Causal, Documents, FirstTokens, Full, KeyLength, Mask, Window

DTYPES = ("bfloat16", "float16", "float32")
# One or more of every bucket that kernels are compiled for, and what a bucket serves beside it.
HEAD_DIMS = [(dim, dim) for dim in (16, 32, 40, 64, 96, 128, 160, 192, 256)]
HEAD_DIMS += [(72, 40), (192, 128)]
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Case:
    """One problem, but for dtype and head dims."""

    mask: Mask
    q_len: int
    k_len: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    softcap: float = 0.0
    sinks: bool = False
    cuts: tuple[int, ...] = ()  # where K/V are cut into blocks that are folded one by one


CASES = (
    Case(Full(), 128, 128),
    Case(Full(), 1, 77, batch=1),
    Case(Causal(), 203, 203),
    Case(Causal(bottom_right=True), 113, 300, heads=6, kv_heads=1),
    Case(Causal() & Window(37, 0), 257, 257, softcap=8.0),
    Case(Causal() & Documents((0, 40, 41, 140, 190)), 190, 190, sinks=True),
    Case(Causal() & (FirstTokens(4) | Window(50, 0)), 150, 150, heads=2),
    Case(KeyLength((90, 0)), 75, 131, sinks=True, softcap=3.0),
    Case(Full(), 3, 3000, heads=8, batch=1),  # split over keys
    Case(Causal(), 203, 203, sinks=True, cuts=(64, 65, 150)),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cuda, cuda:1, cpu (default {device})")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--head-dim", help="comma-separated, for example 64,128 (default: all)")
    parser.add_argument("--no-timings", action="store_true")
    parser.add_argument("--length", type=int, help="of the timed problem")


def run(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("ring_attention selftest: expected a GPU for --device cuda, torch sees none")
        return 2
    if device.type not in checks.DEVICES:
        print(f"ring_attention selftest: this build has no kernels for {device.type}")
        return 2
    wanted = None if args.head_dim is None else {int(dim) for dim in args.head_dim.split(",")}
    print(machine(device))
    print("\n| dtype | head dims | worst | of | repeat | forward | torch | backward | torch |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = False
    for dtype in (getattr(torch, name) for name in args.dtype.split(",")):
        for dims in HEAD_DIMS:
            if wanted is not None and dims[0] not in wanted:
                continue
            worst, name, same = check(dtype, dims, device)
            failed |= not (worst <= 1 and same)
            rates = " | | | " if args.no_timings else timings(dtype, dims, device, args.length)
            columns = (
                str(dtype).removeprefix("torch."),
                f"{dims[0]}/{dims[1]}",
                f"{worst:.2f}",
                name,
                "same" if same else "DIFFERS",
                rates,
            )
            print(f"| {' | '.join(columns)} |", flush=True)
    print(f"\n{'FAILED' if failed else 'ok'}: every 'worst' at most 1, every repeat the same")
    return int(failed)


def machine(device: torch.device) -> str:
    if device.type == "cpu":
        name = f"{platform.processor() or platform.machine()}, {ops.isa_name()}"
    else:
        properties = torch.cuda.get_device_properties(device)
        name = (
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs), CUDA {torch.version.cuda}"
        )
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


# --- Correctness ----------------------------------------------------------------------------------


def check(
    dtype: torch.dtype, dims: tuple[int, int], device: torch.device
) -> tuple[float, str, bool]:
    """The worst error as a share of what is allowed, of what, and whether a repeat was the same."""
    worst, name, same = 0.0, "-", True
    for number, case in enumerate(CASES):
        inputs = problem(case, dtype, dims, device)
        exact = by_reference(case, inputs, torch.float64)
        plain = by_reference(case, inputs, torch.float32)
        got, again = by_kernels(case, inputs), by_kernels(case, inputs)
        same = same and all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        for what, a, b, c in zip(NAMES, got, plain, exact, strict=False):
            # 16-bit kernels' lse is float32, with an exp2 that is good to 2^-13. In float32 the
            # rounding of lse, half a unit in its last place, is an error of a whole row of P.
            largest_lse = exact[1][exact[1].isfinite()].abs().max().item()
            of_lse = 2 ** (math.floor(math.log2(max(largest_lse, 1))) - 24)
            low = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 4 * 2**-23 + of_lse
            floor = 2**-13 if what == "lse" and dtype != torch.float32 else low
            if what == "dsinks":
                floor = low * sink_terms(inputs, exact)
            share = error(a, c) / (2 * error(b.to(a.dtype), c) + floor)
            if not share <= worst:  # NaN too
                worst, name = share, f"{what}, case {number}"
    return worst, name, same


def sink_terms(inputs: dict[str, Any], exact: Sequence[Tensor]) -> float:
    """What dsinks sums, as a share of it: sums of terms that cancel, whose roundings do not."""
    out, lse, *_, dsinks = exact
    probs = torch.exp(inputs["sinks"].double()[:, None] - lse)
    terms = probs[..., None] * inputs["dout"].double() * out
    return float((terms.square().sum(dim=(0, 2, 3)).sqrt().max() / dsinks.abs().max()).item())


def problem(
    case: Case, dtype: torch.dtype, dims: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    begin, end = (x.to(device, torch.int32) for x in case.mask.intervals(case.q_len, case.k_len))
    made: dict[str, Any] = {
        "q": normal(case.batch, case.heads, case.q_len, dims[0]),
        "k": normal(case.batch, case.kv_heads, case.k_len, dims[0]),
        "v": normal(case.batch, case.kv_heads, case.k_len, dims[1]),
        "dout": normal(case.batch, case.heads, case.q_len, dims[1]),
        "dlse": normal(case.batch, case.heads, case.q_len).float(),
        "begin": begin,
        "end": end,
        "sinks": normal(case.heads).float() if case.sinks else None,
    }
    return made


def leaves_of(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    given = {x: inputs[x] for x in ("q", "k", "v", "sinks") if inputs[x] is not None}
    return {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in given.items()}


def by_reference(case: Case, inputs: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    leaves = leaves_of(inputs, dtype)
    visible = reference.visible_keys(inputs["begin"], inputs["end"], case.k_len)
    out, lse = reference.attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        visible,
        softcap=case.softcap,
        sinks=leaves.get("sinks"),
    )
    cotangents = inputs["dout"].to(dtype), inputs["dlse"].to(dtype)
    grads = torch.autograd.grad((out, lse), list(leaves.values()), cotangents)
    return [out.detach(), lse.detach(), *grads]


def by_kernels(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    scale = inputs["q"].shape[3] ** -0.5
    if case.cuts:
        return by_blocks(case, inputs, scale)
    leaves = leaves_of(inputs)
    out, lse = ops.forward(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        inputs["begin"],
        inputs["end"],
        leaves.get("sinks"),
        scale,
        case.softcap,
    )
    cotangents = inputs["dout"], inputs["dlse"]
    grads = torch.autograd.grad((out, lse), list(leaves.values()), cotangents)
    return [out.detach(), lse.detach(), *grads]


def by_blocks(case: Case, inputs: dict[str, Any], scale: float) -> list[Tensor]:
    """The same with the operators of a ring: two states, joined and finished."""
    q, k, v, sinks = (inputs[x] for x in ("q", "k", "v", "sinks"))
    edges = [0, *case.cuts, case.k_len]
    blocks = [
        (k[:, :, a:b], v[:, :, a:b], inputs["begin"] - a, inputs["end"] - a)
        for a, b in pairwise(edges)
    ]
    out, lse = ops.empty_output(q, v)
    states = [ops.empty_state(q, v), ops.empty_state(q, v)]
    for i, (bk, bv, begin, end) in enumerate(blocks):
        state = states[i % 2]
        ops.block_forward_(
            q, [bk], [bv], [begin], [end], sinks if i == 0 else None, *state, None, None,
            first=i < 2, last=False, scale=scale, softcap=case.softcap,
        )  # fmt: skip
    ops.combine_(*states[0], *states[1])
    ops.finish_(*states[0], out, lse)
    delta = ops.delta(out, inputs["dout"], inputs["dlse"])
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    dks, dvs = (
        [torch.zeros(block[i].shape, dtype=lse.dtype, device=q.device) for block in blocks]
        for i in range(2)
    )
    ks, vs, begins, ends = (list(x) for x in zip(*blocks, strict=True))
    ops.block_backward_(
        q, inputs["dout"], lse, delta, ks, vs, begins, ends, dq, dks, dvs, scale, case.softcap
    )
    gradients = [x.to(q.dtype) for x in (dq, torch.cat(dks, dim=2), torch.cat(dvs, dim=2))]
    return [out, lse, *gradients, ops.sink_gradient(sinks, lse, delta)]


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value; infinities must be the same ones."""
    got, exact = got.double(), exact.double()
    if got.shape != exact.shape or not torch.equal(got.isinf(), exact.isinf()):
        return float("inf")
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    difference = (got - exact)[finite].abs().max()  # NaN stays NaN
    return float(difference / exact[finite].abs().max().clamp(min=1e-30))


# --- Timings --------------------------------------------------------------------------------------


def timings(
    dtype: torch.dtype, dims: tuple[int, int], device: torch.device, length: int | None
) -> str:
    """Forward and backward, ours and torch's: four columns."""
    on_gpu = device.type == "cuda"
    n = length or (4096 if on_gpu else 512)
    case = Case(Causal(), n, n, heads=16, kv_heads=16, batch=2 if on_gpu else 1)
    inputs = problem(case, dtype, dims, device)
    q, k, v, dout = (inputs[x] for x in ("q", "k", "v", "dout"))
    mask = inputs["begin"], inputs["end"]
    ring = torch.ops.ring_attention
    scale = dims[0] ** -0.5
    out, lse = ring.forward(q, k, v, *mask, None, scale, 0.0)
    pairs = case.batch * case.heads * n * (n + 1) / 2
    forward, backward = 2.0 * sum(dims) * pairs, (6.0 * dims[0] + 4.0 * dims[1]) * pairs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    graph = F.scaled_dot_product_attention(*leaves, is_causal=True)
    calls: list[tuple[float, Callable[[], object]]] = [
        (forward, lambda: ring.forward(q, k, v, *mask, None, scale, 0.0)),
        (forward, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        (backward, lambda: ring.backward(dout, None, q, k, v, out, lse, *mask, None, scale, 0.0)),
        (backward, lambda: torch.autograd.grad(graph, leaves, dout, retain_graph=True)),
    ]
    return " | ".join(f"{flops / seconds(call, device) / 1e12:.3g}" for flops, call in calls)


def seconds(call: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """The fastest of some calls, after one that warms up."""
    call()
    best = float("inf")
    for _ in range(rounds if device.type == "cuda" else 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start_s)
    return best
