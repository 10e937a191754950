# SPDX-License-Identifier: BSD-3-Clause
"""Ranks that disagree are told; a rank that never arrives is named; a dead one too."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ranks import pool
from ring_attention import agree, attention
from ring_attention.groups import transport_of
from ring_attention.layout import Contiguous, Striped, Zigzag
from ring_attention.mask import Causal, Full, Window
from ring_attention.plan import plan
from ring_attention.ring import RingError
from ring_attention.virtual import run_virtual

LENGTH = 24


def qkv(group: Any, **changes: Any) -> list[torch.Tensor]:
    """This rank's q, k, v of a contiguous layout."""
    shape = {
        "batch": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 16,
        "dtype": torch.float32,
    } | changes
    rows = Contiguous(LENGTH, transport_of(group).size).sizes[transport_of(group).rank]
    return [
        torch.ones(shape["batch"], shape[heads], rows, shape["head_dim"], dtype=shape["dtype"])
        for heads in ("heads", "kv_heads", "kv_heads")
    ]


def call_differently(group: Any, what: str) -> float:
    """Group rank 1 differs from the others in one thing; returns the seconds it took to be told."""
    transport = transport_of(group)
    odd = transport.rank == 1
    layout: Any = Contiguous(LENGTH, transport.size)
    mask: Any = Causal()
    changes: dict[str, Any] = {}
    if odd:
        if what == "mask":
            mask = Causal() & Window(3, 0)
        elif what == "q_layout":
            layout = Striped(LENGTH, transport.size)
        else:
            changes = {
                "dtype": {"dtype": torch.bfloat16},
                "batch": {"batch": 2},
                "heads": {"heads": 4},
                "head_dim": {"head_dim": 32},
            }[what]
    start_s = time.monotonic()
    with pytest.raises(RingError, match=f"ranks disagree about .*({what}|plan|mask)"):
        attention(*qkv(group, **changes), mask=mask, group=group, layout=layout)
    took_s = time.monotonic() - start_s
    with pytest.raises(RingError, match="stays unusable"):
        attention(*qkv(group), group=group, layout=Contiguous(LENGTH, transport.size))
    return took_s


@pytest.mark.parametrize("what", ["mask", "q_layout", "dtype", "batch", "heads", "head_dim"])
def test_virtual_ranks_that_differ_are_all_told(what: str) -> None:
    assert max(run_virtual(3, call_differently, what)) < 10


def call_differently_in_a_new_group(world: Any, what: str) -> float:
    """The group is lost afterwards, the session's pool is not."""
    return call_differently(dist.new_group(), what)


def test_processes_that_differ_are_all_told(pools) -> None:
    assert max(pools(3).run(call_differently_in_a_new_group, "dtype")) < 10


def stay_away(world: Any) -> str:
    group = dist.new_group()
    if dist.get_rank(group) == 1:
        return ""
    os.environ["RING_ATTENTION_TIMEOUT"] = "2"
    try:
        with pytest.raises(RingError) as caught:
            attention(*qkv(group), group=group, layout=Contiguous(LENGTH, 3))
    finally:
        del os.environ["RING_ATTENTION_TIMEOUT"]
    return str(caught.value)


def test_a_rank_that_never_arrives_is_named(pools) -> None:
    messages = pools(3).run(stay_away)
    for rank in (0, 2):
        assert "call 0 (attention)" in messages[rank]
        assert "group ranks [1] never arrived within 2 s" in messages[rank]


def die_between_calls(group: Any) -> str:
    made = plan(Full(), Contiguous(LENGTH, 2), group=group)
    q, k, v = qkv(group)
    agree(made, group, q, k, v)
    if dist.get_rank(group) == 1:
        os._exit(1)
    with pytest.raises(RingError) as caught:
        for _ in range(100):
            attention(q, k, v, plan=made, group=group)
    return str(caught.value)


def test_a_dead_peer_is_named_with_step_and_bytes() -> None:
    with pool(2) as ranks:
        ranks._calls[1].put((die_between_calls, ()))
        ranks._calls[0].put((die_between_calls, ()))
        rank, ok, message = ranks._results.get(timeout=60)
    assert (rank, ok) == (0, True), message
    # K and V of 12 rows, two heads of 16 fp32 numbers.
    assert "K/V" in message and "group rank 1 in step 0, 3072 bytes" in message


def calls_checked(group: Any) -> tuple[int, int]:
    """Checked calls with a plan the ranks agreed on, and without."""
    transport = transport_of(group)
    q, k, v = qkv(group)
    made = plan(Causal(), Contiguous(LENGTH, transport.size), group=group)
    agree(made, group, q, k, v)
    before = transport.book.calls
    for _ in range(3):
        attention(q, k, v, plan=made, group=group)
    agreed = transport.book.calls - before
    for _ in range(3):
        attention(q, k, v, group=group, layout=Contiguous(LENGTH, transport.size), mask=Full())
    with pytest.raises(ValueError, match="expected dtype == float32, as the ranks agreed"):
        attention(*qkv(group, dtype=torch.bfloat16), plan=made, group=group)
    # Keys of finished calls are gone: what is left is the latest one's.
    store = transport.store
    assert not store.check([f"ring_attention/{before}/{transport.rank}"])
    return agreed, transport.book.calls - before


def test_an_agreed_plan_is_posted_without_a_check() -> None:
    assert run_virtual(3, calls_checked) == [(0, 3)] * 3


def test_agree_tells_ranks_that_differ() -> None:
    def fn(group: Any) -> None:
        layout = (Contiguous if group.rank else Zigzag)(LENGTH, 2)
        with pytest.raises(RingError, match="ranks disagree about"):
            agree(plan(Causal(), layout, group=group), group, *qkv(group))

    run_virtual(2, fn)


# --- Bad input, before any communication ----------------------------------------------------------


def refused(group: Any, match: str, **arguments: Any) -> None:
    transport = transport_of(group)
    before = transport.book.calls
    q, k, v = arguments.pop("qkv", None) or qkv(group)
    with pytest.raises((ValueError, TypeError), match=match):
        attention(q, k, v, group=group, **arguments)
    assert transport.book.calls == before


def test_bad_arguments_are_refused_before_any_communication() -> None:
    def fn(group: Any) -> None:
        layout = Contiguous(LENGTH, group.size)
        q, k, v = qkv(group)
        refused(group, "expected layout with a group, got None")
        refused(
            group, r"world_size == 3, the size of the group, got 2", layout=Contiguous(LENGTH, 2)
        )
        refused(group, r"expected q.shape\[2\] == ", layout=Contiguous(LENGTH + 3, group.size))
        refused(group, "dense masks never exist", layout=layout, mask=torch.ones(2, 2))
        refused(group, "either plan or layouts", layout=layout, plan=plan(Full(), layout, rank=0))
        refused(group, "layout or q_layout", layout=layout, q_layout=layout)
        other = plan(Full(), layout, rank=(group.rank + 1) % group.size)
        refused(group, "expected a plan for rank", plan=other)
        mine = plan(Full(), layout, group=group)
        refused(group, "expected mask to be the plan's", plan=mine, mask=Window(1, 0))
        refused(group, r"k.dtype|dtype", layout=layout, qkv=(q, k.double(), v))
        refused(group, "head_dim|shape", layout=layout, qkv=(q, k[..., :8], v))

    run_virtual(3, fn)


def test_a_layout_without_a_group_is_refused() -> None:
    q, k, v = (torch.ones(1, 1, 12, 16) for _ in range(3))
    with pytest.raises(ValueError, match=r"expected group with .*, got None"):
        attention(q, k, v, layout=Contiguous(24, 2))


def test_something_that_is_no_group_is_refused() -> None:
    q, k, v = (torch.ones(1, 1, 12, 16) for _ in range(3))
    with pytest.raises(TypeError, match="expected group to be a ProcessGroup"):
        attention(q, k, v, group="world", layout=Contiguous(12, 1))
