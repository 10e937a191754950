# SPDX-License-Identifier: BSD-3-Clause
"""What the ring owes to NCCL, as far as it shows without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ring_attention import priority
from ring_attention.device_copy import DeviceCopy
from ring_attention.layout import Zigzag
from ring_attention.ring import Message
from ring_attention.virtual import VirtualGroup, run_virtual
from ring_cases import Case, run_rank
from test_ring import CASES, LENGTH, MASKS, SCHEDULES

Batches = list[list[tuple[bool, int, int, str, int]]]  # sending, source, target, kind, bytes


def played(batches: Batches) -> dict[int, Batches]:
    """What is left of all ranks' batches on NCCL's terms.

    A rank's batches run one after the other, each until all of its messages are through; of two
    ranks, the first send that is running and the first receive that is running match.
    """
    left = {rank: list(of_rank) for rank, of_rank in batches.items()}
    while True:
        running = {rank: of_rank[0] for rank, of_rank in left.items() if of_rank}
        pairs = {(source, target) for b in running.values() for _, source, target, _, _ in b}
        moved = False
        for source, target in pairs:
            sends = [m for m in running.get(source, []) if m[:3] == (True, source, target)]
            receives = [m for m in running.get(target, []) if m[:3] == (False, source, target)]
            for send, receive in zip(sends, receives, strict=False):
                assert send[3:] == receive[3:], "matched by order, and not the same message"
                running[source].remove(send)
                running[target].remove(receive)
                moved = True
        for rank, batch in running.items():
            if not batch:
                left[rank].pop(0)
        if not moved:
            return {rank: of_rank for rank, of_rank in left.items() if of_rank}


def as_seen(rank: int, m: Message) -> tuple[bool, int, int, str, int]:
    source, target = (rank, m.peer) if m.sending else (m.peer, rank)
    return m.sending, source, target, m.kind, m.nbytes


@pytest.mark.parametrize("mask", ["full", "window", "documents", "sink tokens"])
@pytest.mark.parametrize("schedule,world_size", CASES)
def test_batches_that_run_one_after_the_other_do_not_lock(
    monkeypatch: pytest.MonkeyPatch, schedule: str, world_size: int, mask: str
) -> None:
    posted: dict[int, Batches] = {rank: [] for rank in range(world_size)}
    post = VirtualGroup.post

    def record(group: VirtualGroup, messages: list[Message]) -> Any:
        if messages:
            posted[group.rank].append([as_seen(group.rank, m) for m in messages])
        return post(group, messages)

    monkeypatch.setattr(VirtualGroup, "post", record)
    case = Case(LENGTH, mask=MASKS[mask], heads=4)
    layout = Zigzag(LENGTH, world_size)
    run_virtual(world_size, run_rank, case, layout, None, SCHEDULES[schedule][world_size])
    assert any(posted.values())
    assert not played(posted)


def test_a_lock_is_found() -> None:
    batches: dict[int, Batches] = {0: [], 1: [], 2: []}
    for rank in range(3):
        to, source = (rank + 1) % 3, (rank - 1) % 3
        batches[rank] = [[(True, rank, to, "K/V", 8)], [(False, source, rank, "K/V", 8)]]
    assert played(batches)


class Group:
    group_name = "a group"

    def __init__(self, options: Any) -> None:
        self._options = options

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(options=self._options)


def test_a_group_of_ordinary_priority_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY", raising=False)
    cuda = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="'a group' to have high priority.*pg_options="):
        priority.advise(Group(SimpleNamespace(is_high_priority_stream=False)), cuda)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "forced"),
    [
        (SimpleNamespace(is_high_priority_stream=True), ""),
        (SimpleNamespace(is_high_priority_stream=False), "1"),
        (SimpleNamespace(), ""),  # another backend's
        (None, ""),
    ],
)
def test_others_are_not(monkeypatch: pytest.MonkeyPatch, options: Any, forced: str) -> None:
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", forced)
    priority.advise(Group(options), torch.device("cuda", 0))


def test_torch_has_the_option() -> None:
    nccl = getattr(torch.distributed, "ProcessGroupNCCL", None)
    if nccl is None:
        pytest.skip("this torch has no NCCL")
    assert nccl.Options(is_high_priority_stream=True).is_high_priority_stream
    assert not nccl.Options().is_high_priority_stream


def test_nothing_is_copied_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run it once before the capture"):
        DeviceCopy(torch.arange(3), torch.device("cuda", 0))


def test_what_is_read_during_a_capture_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = DeviceCopy.__new__(DeviceCopy)  # as if made on a GPU
    copy._tensor, copy.captured = SimpleNamespace(device=torch.device("cuda", 0)), False  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert copy.get() is copy._tensor and copy.captured
