# SPDX-License-Identifier: BSD-3-Clause
"""Network namespaces joined by links of a bandwidth one may choose: a cluster's wires on a laptop.

Every rank lives in a namespace with one interface, `ring0`. Two ranks share a veth pair, more hang
on a bridge in a namespace of its own. A token bucket (tc tbf) bounds what leaves an interface, and
what a bridge hands to it; nothing else is slowed down, and sending costs the CPU what it costs.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

PREFIX = "ring-attention-"
INTERFACE = "ring0"
# Sockets hand this much to a link at once, as network cards merge packets: one by one they would
# cost the CPU five times as much.
PACKET_BYTES = 16384


class Unavailable(RuntimeError):
    """Namespaces or shaping are not to be had here; says why."""


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")


def _remove_leftovers() -> None:
    """Namespaces of launchers that were killed."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).split("-")[0]
        if not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True)


class Links:
    """The namespaces of a ring's ranks, while the context lasts.

    Raises:
        Unavailable: on entering, where this machine or user may not have them.
    """

    def __init__(self, size: int) -> None:
        self._namespaces = [f"{PREFIX}{os.getpid()}-{rank}" for rank in range(size)]
        self._hub = f"{PREFIX}{os.getpid()}-hub"
        self._shaped: list[tuple[str, str]] = []  # (namespace, interface)

    def __enter__(self) -> "Links":
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise Unavailable(f"`{tool}` is missing (Debian: apt install iproute2)")
        if os.geteuid() != 0:
            raise Unavailable("only root makes network namespaces")
        _remove_leftovers()
        try:
            self._make()
            self.shape(1000.0)
        except Unavailable:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _make(self) -> None:
        names = self._namespaces
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        self._shaped = [(name, INTERFACE) for name in names]
        if len(names) == 2:
            ends = [(names[1], INTERFACE)]
        else:
            _run("ip", "netns", "add", self._hub)
            _run("ip", "-n", self._hub, "link", "add", "hub", "type", "bridge")
            _run("ip", "-n", self._hub, "link", "set", "hub", "up")
            ends = [(self._hub, f"to{rank}") for rank in range(len(names))]
            self._shaped += ends
        for name, (other, end) in zip(names, ends, strict=False):
            veth = ["link", "add", INTERFACE, "netns", name, "type", "veth"]
            _run("ip", *veth, "peer", "name", end, "netns", other)
        for rank, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"10.0.0.{rank + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        for name, interface in self._shaped:
            size = ["gso_max_size", str(PACKET_BYTES)]
            _run("ip", "-n", name, "link", "set", interface, *size)
        if len(names) != 2:
            for _, end in ends:
                _run("ip", "-n", self._hub, "link", "set", end, "master", "hub", "up")

    def shape(self, mbit: float) -> None:
        """Bounds every link to so many Mbit/s in each direction."""
        # A bucket of one packet: what a link saved up while idle must not carry a message.
        bucket = ["tbf", "rate", f"{mbit:g}mbit", "burst", str(PACKET_BYTES + 2048), "limit", "4mb"]
        for namespace, interface in self._shaped:
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *bucket)

    def start(self, rank: int, argv: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Starts a process on a rank's side of its link."""
        environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE}
        inside = ["ip", "netns", "exec", self._namespaces[rank], *argv]
        return subprocess.Popen(inside, env=environment, text=True, **options)  # type: ignore

    def _remove(self) -> None:
        for name in (*self._namespaces, self._hub):
            if Path(f"/run/netns/{name}").exists():
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)
