# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a prediction: ranks x time, what each computes, packs, sends and waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .explain import how, tokens
from .prediction import Prediction

_COLORS = {
    ("compute", "forward"): ("#4c9f70", "forward"),
    ("compute", "backward"): ("#2f6690", "backward"),
    ("post", ""): ("#6b4e8a", "packing"),
    ("wait", ""): ("#d1495b", "waiting (exposed communication)"),
    ("transfer", ""): ("#f2c14e", "messages, from posting to completion"),
}
_MOST_RANKS = 16


def draw(prediction: Prediction, path: str | Path) -> None:
    """Draws the ranks of a prediction, at most 16 of them.

    Args:
        prediction: of ``predict`` or ``plan(...).prediction``.
        path: .png, .svg or .pdf; its folder must exist.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "ring_attention: expected matplotlib, to draw a plan, got none; pip install matplotlib"
        ) from error

    forward_s = max(t.seconds for t in prediction.forward)
    count = len(prediction.ranks)
    rows = sorted({i * (count - 1) // max(_MOST_RANKS - 1, 1) for i in range(_MOST_RANKS)})
    if count <= _MOST_RANKS:
        rows = list(range(count))
    unit, scale = ("s", 1.0) if prediction.seconds >= 1 else ("ms", 1e3)
    with matplotlib.rc_context({"font.size": 10, "svg.hashsalt": "ring_attention"}):
        figure = Figure(figsize=(11, 1.6 + 0.45 * len(rows)), layout="constrained")
        axes: Any = figure.subplots()
        for place, row in enumerate(rows):
            for offset_s, phase in ((0.0, prediction.forward), (forward_s, prediction.backward)):
                for event in phase[row].events if phase else ():
                    color, _ = _COLORS[event.name, event.phase if event.name == "compute" else ""]
                    low, height = (0.14, 0.2) if event.name == "transfer" else (-0.34, 0.44)
                    axes.broken_barh(
                        [
                            (
                                scale * (offset_s + event.start_s),
                                scale * (event.end_s - event.start_s),
                            )
                        ],
                        (place + low, height),
                        facecolor=color,
                        edgecolor="white",
                        linewidth=0.3 if event.name in ("compute", "transfer") else 0.0,
                    )
        axes.set_xlim(0, 1.005 * scale * prediction.seconds)
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_yticks(range(len(rows)), [f"rank {prediction.ranks[row]}" for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel(f"{unit}, predicted")
        exposed = 100 * prediction.exposed_s / prediction.seconds if prediction.seconds else 0.0
        axes.set_title(
            f"Predicted: {tokens(prediction)} on {prediction.layout.world_size} "
            f"ranks, {prediction.machine}: {exposed:.1f}% of the time exposed\n"
            f"{how(prediction.schedule)}",
            loc="left",
            fontsize=10,
            weight="bold",
        )
        handles = [Patch(color=color, label=text) for color, text in _COLORS.values()]
        figure.legend(handles=handles, frameon=False, ncols=5, loc="outside lower center")
        figure.savefig(path, dpi=150)
