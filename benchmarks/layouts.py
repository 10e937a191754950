# SPDX-License-Identifier: BSD-3-Clause
"""Layouts for packed documents: work, tokens and bytes per rank, counted from the plans.

    python benchmarks/layouts.py                        # the table
    python benchmarks/layouts.py --json layouts.json    # and as JSON

Nothing is run: pairs and rows are counts, exact for any hardware. Document lengths are log-normal;
of the tokens a quarter and two eighths are three giants in "giants", a tenth is one in "giant".
"""

import argparse
import json
import math
import random
from itertools import accumulate, product
from pathlib import Path

import ring_attention as ra

# Median and sigma of the lengths, and giants as parts of the sequence.
DISTRIBUTIONS: dict[str, tuple[int, float, tuple[float, ...]]] = {
    "log-normal": (2000, 1.5, ()),
    "heavy tail": (1000, 2.0, ()),
    "giant": (2000, 1.5, (0.1,)),
    "giants": (2000, 1.5, (0.25, 0.125, 0.125)),
}


def cu_seqlens(name: str, tokens: int, seed: int) -> list[int]:
    """Cumulative lengths of packed documents, shuffled."""
    median, sigma, giants = DISTRIBUTIONS[name]
    rng = random.Random(seed)
    lengths = [int(part * tokens) for part in giants]
    while (rest := tokens - sum(lengths)) > 0:
        lengths.append(min(rest, max(1, int(rng.lognormvariate(math.log(median), sigma)))))
    rng.shuffle(lengths)
    return [0, *accumulate(lengths)]


def count(layout: ra.Layout, mask: ra.Mask) -> dict[str, float]:
    """Of all ranks' plans, in parts of what an even ring that sends everything has."""
    plans = [ra.plan(mask, layout, rank=rank) for rank in range(layout.world_size)]
    pairs, rows = [sum(p.flops) for p in plans], [sum(p.rows) for p in plans]
    everything = layout.length / layout.world_size * (layout.world_size - 1)
    return {
        "work": max(pairs) * layout.world_size / sum(pairs),
        "tokens": max(layout.sizes) * layout.world_size / layout.length,
        "sent": sum(rows) / layout.world_size / everything,
        "most_sent": max(rows) / everything,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1 << 20, help="default 1048576")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print("documents  ranks | work: most over mean | tokens | K/V rows sent: mean, most (of all)")
    rows = []
    for name, ranks in product(DISTRIBUTIONS, options.ranks):
        cu = cu_seqlens(name, options.tokens, options.seed)
        mask = ra.Causal() & ra.Documents(cu)
        for layout in (
            ra.DocumentBalanced(cu, ranks),
            ra.Zigzag(options.tokens, ranks),
            ra.Contiguous(options.tokens, ranks),
        ):
            kind = type(layout).__name__
            got = count(layout, mask)
            rows.append({"documents": name, "ranks": ranks, "layout": kind} | got)
            print(
                f"{name:10} {ranks:5}   {kind:16} {got['work']:5.2f} {got['tokens']:8.2f}"
                f"{100 * got['sent']:10.1f}% {100 * got['most_sent']:6.1f}%",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
