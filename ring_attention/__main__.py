# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ring_attention COMMAND``: see commands/."""

import argparse
import sys
from importlib import import_module

from .commands import COMMANDS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ring_attention")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.strip().splitlines()[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
