# SPDX-License-Identifier: BSD-3-Clause
"""Predicts the best schedule, its time, exposed communication, memory and bytes on given hardware.

    python -m ring_attention plan --tokens 1M --heads 32 --kv-heads 8 --gpus 64 \\
        --device H100 --link 400G --node-link NVLink --gpus-per-node 8
    python -m ring_attention plan --tokens 64K --gpus 2 --device figures.json --draw plan.png
    python -m ring_attention plan --tokens 1M --queries 1K --gpus 8 --compare

Nothing is run: the schedules of the ranks are made and their steps simulated. Figures are named
ones (A100 H100 H200 B200, published for other kernels; H100-sm90 and CPU, measured with ours;
NVLink NVLink3 NVLink5 PCIe 400G 200G 100G 10G) or a file of `python -m ring_attention calibrate`.
"""

import argparse
import sys
from pathlib import Path

from ..explain import table
from ..figures import DEVICES, LINKS, Machine, load
from ..layout import Contiguous, DocumentBalanced, Layout, Striped, Zigzag
from ..mask import Causal, Documents, Full, Mask, Window
from ..predict import predict
from ..shapes import Shapes
from ..tiles import DEFAULT_TILES

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def count(text: str) -> int:
    """128K and 1M count in powers of 1024, as context lengths do; 1000 is 1000."""
    number, unit = (text[:-1], _UNITS.get(text[-1:].upper(), 0))
    try:
        return int(text) if not unit else int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 65536 or 64K: {text!r}"
        ) from None


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokens", type=count, required=True, metavar="N", help="of the sequence: 131072, 128K, 1M"
    )
    add("--queries", type=count, metavar="N", help="only the last N tokens ask (default: all)")
    add("--gpus", "--ranks", type=int, required=True, metavar="P", help="ranks of the ring")
    add("--heads", type=int, default=32, metavar="H", help="query heads (default 32)")
    add("--kv-heads", type=int, metavar="G", help="K/V heads (default: as --heads)")
    add("--head-dim", type=int, default=128, metavar="D", help="default 128")
    add("--batch", type=int, default=1, metavar="B", help="sequences at once (default 1)")
    add("--dtype", choices=_DTYPES, default="bf16")
    add("--mask", choices=("causal", "full"), default="causal")
    add("--window", type=count, metavar="W", help="keys that a query sees at most, itself included")
    add(
        "--documents",
        type=count,
        nargs="+",
        metavar="N",
        help="lengths of packed documents; repeated until the sequence is full",
    )
    add(
        "--layout",
        choices=("zigzag", "contiguous", "striped", "documents"),
        help="default: documents with --documents, zigzag for causal masks, else contiguous",
    )
    add("--device", default="H100", metavar="NAME|FILE", help=f"{' '.join(DEVICES)}, or a file")
    add("--link", metavar="NAME", help=f"between ranks (default 400G): {' '.join(LINKS)}")
    add("--node-link", metavar="NAME", help="inside a node, with --gpus-per-node")
    add("--gpus-per-node", type=int, default=1, metavar="N", help="consecutive ranks of a node")
    add(
        "--generator",
        choices=("auto", "direct", "chain", "double"),
        default="auto",
        help="auto (default) takes the quickest that fits into memory",
    )
    add(
        "--resident", type=int, default=1, metavar="W", help="resident blocks of --generator direct"
    )
    add(
        "--ulysses",
        type=int,
        metavar="N",
        help="deal heads among N ranks, with rings of P / N (default: what is best with "
        "--generator auto, else 1)",
    )
    add(
        "--traveller",
        nargs="+",
        choices=("auto", "kv", "q"),
        default=["auto"],
        help="what goes around: K/V, or Q and what belongs to it; two words are for forward and "
        "backward (default auto)",
    )
    add("--compare", action="store_true", help="list all schedules that were considered")
    add(
        "--invariant",
        type=int,
        nargs="?",
        const=DEFAULT_TILES,
        metavar="TILES",
        help=f"the same bits for every number of ranks (tiles: default {DEFAULT_TILES})",
    )
    add("--memory", type=float, metavar="GB", help="per rank (default: the device's)")
    add("--forward", action="store_true", help="forward only")
    add("--draw", type=Path, metavar="FILE", help="a picture, ranks x time: .png, .svg or .pdf")


def _mask(args: argparse.Namespace, bounds: list[int]) -> Mask:
    if args.queries is not None:
        if args.window is not None or bounds:
            raise ValueError("ring_attention plan: --queries goes with --mask only")
        return Causal(bottom_right=True) if args.mask == "causal" else Full()
    mask: Mask = Causal() if args.mask == "causal" else Full()
    if args.window is not None:
        side = args.window - 1
        mask = Causal() & Window(side, 0) if args.mask == "causal" else Window(side, side)
    return mask & Documents(bounds) if bounds else mask


def _layout(args: argparse.Namespace, bounds: list[int], tokens: int) -> Layout:
    usual = "documents" if bounds else "zigzag" if args.mask == "causal" else "contiguous"
    name = args.layout or usual
    if name == "documents":
        if not bounds:
            raise ValueError("ring_attention plan: --layout documents needs --documents LENGTHS")
        return DocumentBalanced(bounds, args.gpus, window=args.window)
    kinds: dict[str, type[Layout]] = {
        "zigzag": Zigzag,
        "contiguous": Contiguous,
        "striped": Striped,
    }
    return kinds[name](tokens, args.gpus)


def _machine(args: argparse.Namespace) -> Machine:
    device, link = args.device, args.link
    if Path(device).suffix == ".json" or Path(device).is_file():
        measured = load(device)
        device, link = measured.device, link or measured.link
    return Machine(device, link or "400G", args.node_link, args.gpus_per_node)


def _bounds(args: argparse.Namespace) -> list[int]:
    if not args.documents:
        return []
    if min(args.documents) < 1:
        raise ValueError("ring_attention plan: --documents are lengths of at least one token")
    bounds = [0]
    while bounds[-1] < args.tokens:
        length = args.documents[(len(bounds) - 1) % len(args.documents)]
        bounds.append(min(bounds[-1] + length, args.tokens))
    return bounds


def run(args: argparse.Namespace) -> int:
    try:
        bounds = _bounds(args)
        prediction = predict(
            _mask(args, bounds),
            _layout(args, bounds, args.tokens if args.queries is None else args.queries),
            Shapes(
                args.heads,
                args.heads if args.kv_heads is None else args.kv_heads,
                args.head_dim,
                dtype=_DTYPES[args.dtype],
                batch=args.batch,
            ),
            _machine(args),
            k_layout=_layout(args, bounds, args.tokens),
            generator=args.generator,
            resident=args.resident,
            invariant=False if args.invariant is None else args.invariant,
            ulysses=args.ulysses,
            traveller=args.traveller[0] if len(args.traveller) == 1 else tuple(args.traveller),
            memory_bytes=None if args.memory is None else args.memory * 1e9,
            backward=not args.forward,
        )
        print(prediction.explain())
        if args.compare:
            print("\nAll schedules that fit, predicted:\n")
            print("\n".join(table(list(prediction.candidates))))
        if args.draw is not None:
            prediction.draw(args.draw)
            print(f"\nThe picture is in {args.draw}.")
    except (ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0
