# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the network benchmark: who waits, against shard length and bandwidth."""

from pathlib import Path
from typing import Any

from break_even import HIDDEN

TICKS = (250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Waiting against shard length, a panel per direction and mask, a colour per bandwidth."""
    from matplotlib.figure import Figure

    kinds = sorted({(row["direction"], row["mask"]) for row in rows}, reverse=True)
    speeds = sorted({row["mbit"] for row in rows})
    colors = dict(
        zip(speeds, ("#d1495b", "#f2803a", "#4c9f70", "#2f6690", "#8d5a97"), strict=False)
    )
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for panel, kind in zip(panels, kinds, strict=False):
        for row in sorted(rows, key=lambda row: row["mbit"]):
            if (row["direction"], row["mask"]) != kind:
                continue
            tokens = [point["tokens"] for point in row["points"]]
            waiting = [100 * point["link_waiting"] for point in row["points"]]
            color = colors[row["mbit"]]
            panel.plot(tokens, waiting, ".-", color=color, label=f"{row['mbit']:g} Mbit/s")
            panel.axvline(row["predicted_tokens"], color=color, lw=1, ls=":")
        panel.axhline(100 * HIDDEN, color="#9aa5b1", lw=1)
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        ticks = [tokens for tokens in TICKS if low <= tokens <= high]
        panel.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        panel.minorticks_off()
        panel.set_title(f"{kind[0]}, {kind[1]}", loc="left", weight="bold")
        panel.set_xlabel("tokens per rank")
        panel.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("measured: % of a call")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="outside lower center")
    figure.suptitle("Waiting for the link; dotted: the predicted break-even", x=0.01, ha="left")
    figure.savefig(path)
