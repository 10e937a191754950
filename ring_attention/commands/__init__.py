# SPDX-License-Identifier: BSD-3-Clause
"""What ``python -m ring_attention`` can do: a module each, with a docstring that --help shows,
``arguments(parser)`` and ``run(args) -> exit code``.
"""

COMMANDS: tuple[str, ...] = ("plan", "calibrate", "trace")
