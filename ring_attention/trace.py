# SPDX-License-Identifier: BSD-3-Clause
"""What each rank did when: compute, post, transfer and wait intervals of the ring.

Three listeners see the same intervals under the same names: ``record()`` in this process, the files
that ``record(folder)`` or the environment's RING_ATTENTION_TRACE write (Chrome traces, see
trace_files.py), and torch's profiler. Where nobody listens an interval costs a test.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.autograd import profiler

from .events import Event, Leg, Name, Phase, label
from .trace_files import Writer

if TYPE_CHECKING:
    from .ring import Message, Transport

__all__ = ["Event", "Leg", "record"]

_listeners: list[Callable[[Event], None]] = []
_lock = threading.Lock()


@contextmanager
def record(folder: str | os.PathLike[str] | None = None) -> Iterator[list[Event]]:
    """Collects the events of every ring call in this process, from all its (virtual) ranks.

    Args:
        folder: where to write them as well, one Chrome trace per rank, for Perfetto,
            chrome://tracing and ``python -m ring_attention trace``; every rank passes the same one.

    Example:
        >>> with ring_attention.trace.record() as events:
        ...     ring_attention.attention(q, k, v, group=group, layout=layout)
        >>> waited_s = sum(e.seconds for e in events if e.name == "wait")
    """
    events: list[Event] = []
    writer = None if folder is None else Writer(folder)

    def listen(event: Event) -> None:  # a function of its own, so that it can be found again
        events.append(event)
        if writer is not None:
            writer.add(event)

    with _lock:
        _listeners.append(listen)
    try:
        yield events
    finally:
        with _lock:
            _listeners.remove(listen)
        if writer is not None:
            writer.close()


def now() -> float:
    """Seconds on the clock of the events."""
    return time.monotonic()


class Range:
    """An interval that has begun; as a context manager it ends without messages."""

    def __init__(
        self,
        name: Name,
        phase: Phase,
        transport: "Transport",
        step: int,
        start_s: float | None = None,
    ) -> None:
        self._what: tuple[Name, Phase, Transport, int] = name, phase, transport, step
        self._profiled: Any = None
        if profiler._is_profiler_enabled:
            self._profiled = profiler.record_function(label(name, phase, step))
            self._profiled.__enter__()
        self._start_s = now() if start_s is None else start_s

    def end(self, messages: Iterable["Message"] = ()) -> None:
        """Ends it now: messages are what was posted or waited for."""
        if self._profiled is not None:
            self._profiled.__exit__(None, None, None)
        emit(*self._what, self._start_s, messages)

    def __enter__(self) -> "Range":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class _Unheard(Range):
    def __init__(self) -> None: ...

    def end(self, messages: Iterable["Message"] = ()) -> None: ...


_unheard = _Unheard()


def begin(
    name: Name, phase: Phase, transport: "Transport", step: int, start_s: float | None = None
) -> Range:
    """Begins an interval; ranges of a thread nest, as torch's profiler demands.

    Args:
        start_s: when it began for the other listeners, if that was earlier.
    """
    if _listeners or profiler._is_profiler_enabled:
        return Range(name, phase, transport, step, start_s)
    return _unheard


def emit(
    name: Name,
    phase: Phase,
    transport: "Transport",
    step: int,
    start_s: float,
    messages: Iterable["Message"] = (),
) -> None:
    """An interval that ends now; torch's profiler does not see it (a transfer spans others)."""
    if not _listeners:
        return
    end_s = now()
    legs = tuple(Leg(m.peer, m.kind, m.sending, m.nbytes) for m in messages)
    if name != "compute" and not legs:
        return  # an empty hop
    nbytes = sum(leg.bytes for leg in legs)
    ring, place, rank = transport.ring, transport.place, transport.rank
    event = Event(name, phase, rank, step, start_s, end_s, nbytes, ring, place, legs)
    for listen in list(_listeners):
        listen(event)


def _listen_for_environment() -> None:
    folder = os.environ.get("RING_ATTENTION_TRACE")
    if folder:
        _listeners.append(Writer(folder).add)


_listen_for_environment()
