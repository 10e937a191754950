# SPDX-License-Identifier: BSD-3-Clause
"""Predictions as text, for people."""

from __future__ import annotations

from typing import Any

from .costs import break_even
from .mask_algebra import Mask
from .prediction import Candidate, Prediction

# Candidates that explain() lists beside the one that was chosen.
_LISTED = 5


def explain(prediction: Prediction) -> str:
    """A prediction as a table, with what was considered beside it."""
    return "\n".join([*_problem(prediction), *_phases(prediction), *_remarks(prediction)])


def _problem(p: Prediction) -> list[str]:
    layout, shapes, world = p.layout, p.shapes, p.layout.world_size
    who = "every rank" if len(p.ranks) == world else f"ranks {p.ranks}, in step"
    return [
        f"{p.mask!r} over {tokens(p)} on {world} ranks, {type(layout).__name__}",
        f"  {shapes.heads} heads, {shapes.kv_heads} K/V heads of {shapes.head_dim}, "
        f"{shapes.dtype}, batch {shapes.batch}; {p.machine}",
        f"  schedule: {how(p.schedule)}",
        f"  predicted by a simulation of {who}:",
    ]


def _phases(p: Prediction) -> list[str]:
    lines = ["", "             time    compute   exposed   packing      sent  received"]
    for name, phase in (("forward", p.forward), ("backward", p.backward)):
        if phase:
            cells = [
                time(max(t.seconds for t in phase)),
                time(max(t.compute_s for t in phase)),
                f"{100 * max(t.wait_s / max(t.seconds, 1e-12) for t in phase):.1f}%",
                time(max(t.post_s for t in phase)),
                size(max(t.sent_bytes for t in phase)),
                size(max(t.received_bytes for t in phase)),
            ]
            lines.append(f"  {name:8}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _remarks(p: Prediction) -> list[str]:
    sizes = sorted(p.layout.sizes)
    lines = [
        "",
        f"  memory per rank: {size(p.memory_bytes)}, of which message buffers "
        f"{size(max(p.ring_memory))} (attention alone: no weights, no other activations)",
        f"  compute: {p.imbalance:.3f} times the mean at most; tokens per rank: "
        f"{sizes[0]:,} to {sizes[-1]:,}",
    ]
    if p.ulysses < p.layout.world_size > 1:
        causal = p.imbalance < 1.1 and _half(p.mask)
        even = break_even(p.shapes, p.machine, causal, p.traveller)
        # What goes around are the shards of a whole Ulysses group.
        parts = [
            f"{count / p.ulysses:,.0f} {'keys' if what == 'q' else 'tokens'} per rank on in the "
            f"{name}"
            for count, what, name in zip(even, p.traveller, ("forward", "backward"), strict=True)
        ]
        kind = "causal" if causal else "full blocks"
        lines.append(
            f"  a hop over {p.machine.link.name} hides from {', from '.join(parts)} ({kind})"
        )
    if stolen := max(t.stolen_s for phase in (p.forward, p.backward) for t in phase):
        lines.append(f"  the transport takes up to {time(stolen)} of a phase from the kernels")
    others = [c for c in p.candidates if c.schedule != p.schedule]
    if others:
        lines += ["", f"  of {len(p.candidates)} schedules, next:", *table(others[:_LISTED])]
    return lines


def table(candidates: list[Candidate]) -> list[str]:
    """A line per schedule."""
    lines = ["        time   exposed    memory      sent  schedule"]
    for c in candidates:
        exposed = f"{100 * c.exposed_s / max(c.seconds, 1e-12):.1f}%"
        cells = [time(c.seconds), exposed, size(c.memory_bytes), size(c.bytes_sent)]
        cells[0] = f"{cells[0]:>12}"
        lines.append("".join(f"{cell:>10}" for cell in cells) + f"  {how(c.schedule)}")
    return lines


def how(schedule: dict[str, Any]) -> str:
    """A schedule in words."""
    words = dict(schedule)
    both = words.pop("traveller", None)
    text = ", ".join(f"{name}={value}" for name, value in words.items())
    return text if both is None else f"{text}, {'/'.join(both)} travel"


def tokens(p: Prediction) -> str:
    """How many there are."""
    if p.k_layout.length == p.layout.length:
        return f"{p.layout.length:,} tokens"
    return f"{p.layout.length:,} tokens of queries, {p.k_layout.length:,} of keys"


def _half(mask: Mask) -> bool:
    return mask.to_dict() == {"mask": "Causal", "bottom_right": False}


def time(seconds: float) -> str:
    """With a unit."""
    for unit, whole in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= whole:
            return f"{seconds / whole:.3g} {unit}" if seconds < 1e3 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} us"


def size(count: float) -> str:
    """With a unit."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
