# SPDX-License-Identifier: BSD-3-Clause
"""Traces as files: written by each rank, read together.

Note [clocks]. Events carry the machine's monotonic clock, which all processes of a machine share,
so their traces line up to the microsecond. In the files the wall clock of the machine at the start
of the trace is added: traces of several machines line up as well as their wall clocks do (NTP, PTP)
and no rank has to be asked. `Timeline.clock_error_s` says by how much they certainly do not: a
message was seen to arrive before it was sent.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from .events import Event, Leg, label
from .timeline import Timeline

# Rows of a rank in the viewers. Posting and waiting never overlap; transfers may, so they take the
# first row from this one on that is free.
_LANES = {"compute": 0, "post": 1, "wait": 1, "transfer": 2}
_LANE_NAMES = ("compute", "post and wait", "messages under way")


def _host() -> str:
    """What tells machines apart: monotonic clocks of one boot are one clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _wall_minus_monotonic_s() -> float:
    # The tightest of a few readings: nothing came between the two clocks.
    readings = []
    for _ in range(5):
        before_s, wall_s, after_s = time.monotonic(), time.time(), time.monotonic()
        readings.append((after_s - before_s, wall_s - (before_s + after_s) / 2))
    return min(readings)[1]


class Writer:
    """Writes events as they come, a Chrome trace (a JSON array of events) per rank."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                "ring_attention.trace: expected a folder for the traces that can be made, got "
                f"{str(folder)!r} ({error.strerror}); is there a file of that name, or no right "
                "to write?"
            ) from error
        self._ahead_s = _wall_minus_monotonic_s()
        self._files: dict[str, TextIO] = {}
        self._busy: dict[tuple[str, int], float] = {}  # until when
        self._lock = threading.Lock()

    def add(self, event: Event) -> None:
        number = int("".join(filter(str.isdigit, event.place)))
        with self._lock:
            file = self._files.get(event.place)
            if file is None:
                file = self._files[event.place] = self._open(event.place, number)
            record = {
                "name": label(event.name, event.phase, event.step),
                "cat": event.name,
                "ph": "X",
                "ts": round(1e6 * (event.start_s + self._ahead_s), 3),
                "dur": round(1e6 * event.seconds, 3),
                "pid": number,
                "tid": self._lane(event),
                "args": {
                    "phase": event.phase,
                    "step": event.step,
                    "group": event.group,
                    "rank": event.rank,
                    "bytes": event.bytes,
                    "start_s": event.start_s,
                    "legs": [[x.peer, x.kind, x.sending, x.bytes] for x in event.legs],
                },
            }
            file.write(f",\n{json.dumps(record)}")

    def _lane(self, event: Event) -> int:
        lane = _LANES[event.name]
        if event.name == "transfer":
            while self._busy.get((event.place, lane), 0.0) > event.start_s:
                lane += 1
            self._busy[event.place, lane] = event.end_s
        return lane

    def _open(self, place: str, number: int) -> TextIO:
        # Line by line: a rank that is killed leaves all it did. The closing bracket is optional.
        file = open(self._folder / f"{place}.json", "w", buffering=1)  # noqa: SIM115
        about = {"host": _host(), "wall_minus_monotonic_s": self._ahead_s, "place": place}
        names: list[tuple[str, int, dict[str, Any]]] = [("process_name", 0, {"name": place})]
        names += [("process_sort_index", 0, {"sort_index": number}), ("ring_attention", 0, about)]
        names += [("thread_name", lane, {"name": name}) for lane, name in enumerate(_LANE_NAMES)]
        file.write(
            "[\n"
            + ",\n".join(
                json.dumps({"name": name, "ph": "M", "pid": number, "tid": lane, "args": args})
                for name, lane, args in names
            )
        )
        return file

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.write("\n]\n")
                file.close()
            self._files.clear()


def _load(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    try:
        return list(json.loads(text))
    except json.JSONDecodeError:
        pass
    # Of a rank that is still running, or was killed: without the bracket, and the last line cut.
    events = []
    for line in text.splitlines()[1:]:
        try:
            events.append(json.loads(line.rstrip(",")))
        except json.JSONDecodeError:
            break
    return events


def read(folder: str | os.PathLike[str]) -> Timeline:
    """Reads the traces of all ranks.

    Args:
        folder: what RING_ATTENTION_TRACE or ``trace.record(folder)`` was.

    Raises:
        ValueError: no traces there, or traces of different runs.
    """
    where = "python -m ring_attention trace"
    events: list[Event] = []
    hosts: dict[str, float] = {}
    for path in sorted(Path(folder).glob("*.json")):
        records = _load(path)
        about = next((r["args"] for r in records if r["name"] == "ring_attention"), None)
        if about is None:
            continue  # somebody else's
        # Processes of one machine have one monotonic clock, whatever was added to it.
        ahead_s = hosts.setdefault(about["host"], about["wall_minus_monotonic_s"])
        for r in records:
            if r["ph"] != "X":
                continue
            args = r["args"]
            start_s = args["start_s"] + ahead_s
            events.append(
                Event(
                    r["cat"],
                    args["phase"],
                    args["rank"],
                    args["step"],
                    start_s,
                    start_s + r["dur"] / 1e6,
                    args["bytes"],
                    args["group"],
                    about["place"],
                    tuple(Leg(*leg) for leg in args["legs"]),
                )
            )
    if not events:
        raise ValueError(
            f"{where}: expected traces of ranks in {str(folder)!r}, found none; run the job with "
            "RING_ATTENTION_TRACE set to this folder"
        )
    timeline = Timeline(events, len(hosts))
    present = {(e.group, e.rank) for e in events}
    missing = {(e.group, x.peer) for e in events for x in e.legs} - present
    if missing:
        group, rank = min(missing)
        raise ValueError(
            f"{where}: expected traces of all ranks, found none of rank {rank} of group {group!r}; "
            "copy the files of all machines into one folder, and remove those of other runs"
        )
    return timeline
