# SPDX-License-Identifier: BSD-3-Clause
"""The two pictures of a training run: its loss, and what every rank's ring did when."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ring_attention.trace import Event

INK, PALE = "#1f2933", "#9aa5b1"
COLORS = {
    ("compute", "forward"): ("#4c9f70", "attention, forward"),
    ("compute", "backward"): ("#2f6690", "attention, backward"),
    ("transfer", ""): ("#f2c14e", "messages, from posting to completion"),
    ("wait", ""): ("#d1495b", "waiting for them"),
}
STAGES = ["#4c9f70", "#2f6690", "#8d5a97", "#d1495b", "#f2803a"]


def _axes(rows: int, height: float) -> list[Axes]:
    pyplot.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": PALE,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    _, axes = pyplot.subplots(rows, figsize=(10, height), squeeze=False, layout="constrained")
    return list(axes[:, 0])


def _save(path: Path) -> None:
    pyplot.savefig(path, dpi=150)
    pyplot.close()


def draw_loss(history: Sequence[dict], entropy: float, path: Path) -> None:
    """Bits per byte of every step, by context, under the entropy of a single byte."""
    (axes,) = _axes(1, 5)
    contexts = list(dict.fromkeys(now["context"] for now in history))
    for color, context in zip(STAGES * len(contexts), contexts, strict=False):
        steps = [i for i, now in enumerate(history, 1) if now["context"] == context]
        bits = [history[i - 1]["bits"] for i in steps]
        label = f"context {context:,}"
        axes.plot(steps, bits, ".-", color=color, label=label, lw=1.5, ms=5)
    axes.axhline(entropy, color=INK, ls="--", lw=1)
    axes.annotate(
        f"bytes counted alone: {entropy:.2f}",
        (1, entropy),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
    )
    last = history[-1]["bits"]
    axes.annotate(
        f"{last:.2f}", (len(history), last), (6, 0), textcoords="offset points", va="center"
    )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.set_title("Next-byte loss of the training text", loc="left", weight="bold")
    axes.grid(axis="y", color=PALE, alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    _save(path)


def draw_timeline(ranks: Sequence[Sequence[Event]], title: str, path: Path) -> None:
    """A lane of computing and one of communicating per rank: a whole step, then a closer look."""
    events = [event for rank in ranks for event in rank]
    whole, close = _axes(2, 2.2 + 1.6 * len(ranks))
    if events:
        begin = min(event.start_s for event in events)
        end = max(event.end_s for event in events) - begin
        for axes in (whole, close):
            _lanes(axes, ranks, begin)
        # The closer look: around the longest wait.
        longest = max(events, key=lambda e: (e.name == "wait", _seconds(e)))
        middle, half = (longest.start_s + longest.end_s) / 2 - begin, end / 8
        whole.set_xlim(-0.005 * end, 1.005 * end)
        whole.axvspan(middle - half, middle + half, color=PALE, alpha=0.2, lw=0, zorder=0)
        close.set_xlim(middle - half, middle + half)
    else:
        whole.text(0.5, 0.5, "one rank: nothing travels", ha="center", transform=whole.transAxes)
    whole.set_title(title, loc="left", weight="bold")
    close.set_title(
        "A closer look at the grey part",
        loc="left",
        weight="bold",
    )
    close.set_xlabel("seconds (the rest of the model runs in the gaps)")
    handles = [Patch(color=color, label=label) for color, label in COLORS.values()]
    whole.figure.legend(handles=handles, frameon=False, ncols=4, loc="outside lower center")
    _save(path)


def _lanes(axes: Axes, ranks: Sequence[Sequence[Event]], begin: float) -> None:
    lanes = {"compute": (-0.32, 0.38), "transfer": (0.08, 0.28), "wait": (0.08, 0.28)}
    for rank, events in enumerate(ranks):
        for name, (y, height) in lanes.items():
            for phase in ("forward", "backward"):
                chosen = [event for event in events if (event.name, event.phase) == (name, phase)]
                color, _ = COLORS.get((name, phase)) or COLORS[name, ""]
                axes.broken_barh(
                    [(event.start_s - begin, _seconds(event)) for event in chosen],
                    (rank + y, height),
                    facecolor=color,
                    edgecolor="white",
                    linewidth=0 if name == "wait" else 0.4,
                )
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    axes.set_ylim(len(ranks) - 0.4, -0.5)
    axes.tick_params(axis="y", length=0)


def _seconds(event: Event) -> float:
    return event.end_s - event.start_s
