# SPDX-License-Identifier: BSD-3-Clause
"""The launcher's side of the network benchmark: all ranks of a ring, on links it can shape."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from subprocess import PIPE
from typing import Any

import network_rank
from break_even import Measured, Shaped
from links import Links
from network_rank import Shape


class Ring:
    """The ranks' processes: asked together, and all answer."""

    def __init__(self, links: Links, size: int, shape: Shape, folder: str) -> None:
        self.links, self.size, self.shape, self.folder = links, size, shape, folder
        settings = json.dumps([size, f"{folder}/store", asdict(shape)])
        self.ranks = [
            links.start(
                rank,
                [sys.executable, network_rank.__file__, str(rank), settings],
                stdin=PIPE,
                stdout=PIPE,
            )
            for rank in range(size)
        ]

    def ask(self, name: str, **arguments: Any) -> list[Any]:
        """All ranks' answers to a command."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([name, arguments]) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        if not all(answers):
            raise RuntimeError("a rank died; its error is above")
        return [json.loads(answer) for answer in answers]

    def link(self, mbit: float) -> Shaped:
        """Shapes the links; what the slowest carries then, of payload, and what that takes."""
        self.links.shape(mbit)
        answers = self.ask("link", nbytes=int(mbit * 1e6 / 8 * 0.06))
        taken = mean(answer["cpu_s_per_byte"] for answer in answers)
        return Shaped(min(answer["bytes_s"] for answer in answers), taken)

    def run(
        self,
        direction: str,
        mask: str,
        tokens: int,
        rounds: int,
        *,
        sending: bool = True,
        folder: Path | None = None,
    ) -> "Measured":
        order = [True, False] if sending else [False]
        answers = self.ask(
            "run",
            mask=mask,
            tokens=tokens,
            direction=direction,
            rounds=rounds,
            sending=order,
            folder=folder and str(folder),
        )
        turns = list(zip(*(answer["runs"] for answer in answers), strict=True))
        return Measured.of(tokens, turns)

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(timeout=60)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@contextmanager
def ring(size: int, shape: Shape) -> Iterator[Ring]:
    """A ring of ranks on links; nothing of it is left behind."""
    with Links(size) as links, tempfile.TemporaryDirectory() as folder:
        made = Ring(links, size, shape, folder)
        try:
            yield made
            made.close()
        finally:
            made.kill()
