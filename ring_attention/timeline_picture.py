# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a timeline: a lane of computing and one of communicating per rank."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .timeline import Timeline
from .trace import Event

_INK, _PALE = "#1f2933", "#9aa5b1"
_COLORS = {
    ("compute", "forward"): ("#4c9f70", "forward"),
    ("compute", "backward"): ("#2f6690", "backward"),
    ("transfer", ""): ("#f2c14e", "messages, from posting to completion"),
    ("post", ""): ("#6b4e8a", "packing and posting"),
    ("wait", ""): ("#d1495b", "waiting"),
}
# (offset, height) around the middle of a rank's row
_LANES = {"compute": (-0.36, 0.42), "transfer": (0.08, 0.26), "post": (0.08, 0.26)}
_LANES["wait"] = _LANES["transfer"]


def draw(timeline: Timeline, path: str | Path) -> None:
    """Draws all of a run and, where there is more than one call, a closer look.

    Args:
        timeline: of all ranks.
        path: .png, .svg or .pdf; its folder must exist.
    """
    events, ranks = timeline.events, timeline.ranks
    begin = min(e.start_s for e in events)
    end = max(e.end_s for e in events) - begin
    # The closer look: around the longest wait, about ten intervals of computing wide.
    longest = max(events, key=lambda e: (e.name == "wait", e.seconds))
    middle = (longest.start_s + longest.end_s) / 2 - begin
    mean_s = sum(e.seconds for e in events if e.name == "compute") / max(
        1, sum(e.name == "compute" for e in events)
    )
    half = max(5 * mean_s, longest.seconds)
    two = 2 * half < 0.8 * end
    with matplotlib.rc_context({"font.size": 10, "svg.hashsalt": "ring_attention"}):
        rows = 2 if two else 1
        figure = Figure(figsize=(11, 1.2 + rows * (0.7 + 0.55 * len(ranks))), layout="constrained")
        axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
        for axis in axes:
            _lanes(axis, events, ranks, begin)
        axes[0].set_xlim(-0.005 * end, 1.005 * end)
        axes[0].set_title(_title(timeline), loc="left", weight="bold")
        if two:
            axes[0].axvspan(middle - half, middle + half, color=_PALE, alpha=0.2, lw=0, zorder=0)
            axes[1].set_xlim(max(0.0, middle - half), min(end, middle + half))
            axes[1].set_title("A closer look at the grey part", loc="left", weight="bold")
        axes[-1].set_xlabel("seconds")
        handles = [Patch(color=color, label=text) for color, text in _COLORS.values()]
        figure.legend(handles=handles, frameon=False, ncols=5, loc="outside lower center")
        figure.savefig(path, dpi=150)


def _title(timeline: Timeline) -> str:
    waited_s, under_way_s = (
        sum(e.seconds for e in timeline.events if e.name == name) for name in ("wait", "transfer")
    )
    hidden = 1.0 - waited_s / under_way_s if under_way_s else 1.0
    return f"Measured: {100 * hidden:.0f}% of the communication hidden behind computing"


def _lanes(
    axes: Axes, events: Sequence[Event], ranks: Sequence[tuple[str, int]], begin: float
) -> None:
    rows = {key: row for row, key in enumerate(ranks)}
    for (name, phase), (color, _) in _COLORS.items():
        y, height = _LANES[name]
        for key, row in rows.items():
            chosen = [
                (e.start_s - begin, e.seconds)
                for e in events
                if e.name == name and (e.group, e.rank) == key and phase in ("", e.phase)
            ]
            axes.broken_barh(
                chosen,
                (row + y, height),
                facecolor=color,
                edgecolor="white",
                linewidth=0.3 if name in ("compute", "transfer") else 0,
            )
    groups = {group for group, _ in ranks}
    texts = [f"rank {rank}" if len(groups) == 1 else f"{group}: {rank}" for group, rank in ranks]
    axes.set_yticks(range(len(ranks)), texts)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=_INK)
