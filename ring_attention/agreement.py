# SPDX-License-Identifier: BSD-3-Clause
"""Ranks that disagree are told before anything is posted.

Every checked call of a group has a number. Each rank writes what it is about to do under that
number into the group's Store, reads what the others wrote, and goes on only when all agree. A rank
that differs is told in seconds, and so is every other; a rank that never arrives is named after
the time-out. A collective would not do: a rank that skipped it would hang both.
"""

import json
import time
from typing import Any

from .ring import RingError, Transport, timeout_s

# Between looks at the Store. (Its own wait would log a warning whenever a peer is late.)
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 20e-3
_POISON = "ring_attention/poison"


def poison(store: Any, why: str) -> None:
    """Tells every rank that waits in a check, or will, that the group is lost."""
    store.set(_POISON, why)


def check(transport: Transport, what: dict[str, str]) -> None:
    """Returns when every rank of the group has arrived at this call with the same `what`.

    Args:
        transport: the group.
        what: readable name -> value of everything the ranks must agree on; "call" names the call.

    Raises:
        RingError: ranks differ (naming the first difference), one never arrived, or the group
            has seen a mismatch before.
    """
    book = transport.book
    if book.poison is not None:
        raise RingError(f"{book.poison}; the group stays unusable after that")
    number = book.calls
    book.calls += 1
    key = f"ring_attention/{number}"
    transport.store.set(f"{key}/{transport.rank}", json.dumps(what))
    try:
        _await_peers(transport, key, number, what)
    except RingError as error:
        book.poison = str(error)
        poison(transport.store, book.poison)
        raise
    if number > 0:
        # Everyone has arrived at this call, so everyone is done with the one before.
        transport.store.delete_key(f"ring_attention/{number - 1}/{transport.rank}")


def _await_peers(transport: Transport, key: str, number: int, what: dict[str, str]) -> None:
    store = transport.store
    missing = [peer for peer in range(transport.size) if peer != transport.rank]
    deadline = time.monotonic() + timeout_s()
    pause_s = _SHORTEST_PAUSE_S
    while missing:
        if time.monotonic() > deadline:
            raise RingError(
                f"ring_attention: call {number} ({what['call']}) of group {transport.name!r}: "
                f"group ranks {missing} never arrived within {timeout_s():g} s; they made fewer "
                "calls than this rank, are still busy, or died"
            )
        arrived = [peer for peer in missing if store.check([f"{key}/{peer}"])]
        for peer in arrived:
            _compare(transport, peer, number, what, json.loads(store.get(f"{key}/{peer}")))
        missing = [peer for peer in missing if peer not in arrived]
        if missing:
            if store.check([_POISON]):
                raise RingError(store.get(_POISON).decode())
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _compare(
    transport: Transport, peer: int, number: int, mine: dict[str, str], theirs: dict[str, str]
) -> None:
    for name in mine | theirs:  # in their order: the plan, a mere number, last
        if mine.get(name) != theirs.get(name):
            raise RingError(
                f"ring_attention: call {number} of group {transport.name!r}: ranks disagree about "
                f"{name}: group rank {transport.rank} has {mine.get(name)}, group rank {peer} has "
                f"{theirs.get(name)}; every rank of a ring must make the same calls with the same "
                "mask, layout, heads and dtype"
            )
