# SPDX-License-Identifier: BSD-3-Clause
"""The ring against the unsharded fp64 reference: every layout, mask and world size."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_cases
from ring_attention import messages, trace
from ring_attention.layout import Contiguous, DocumentBalanced, Layout, Striped, Zigzag
from ring_attention.mask import (
    Causal,
    Chunks,
    Documents,
    FirstTokens,
    Full,
    KeyLength,
    Mask,
    PrefixLM,
    Window,
)
from ring_attention.plan import plan
from ring_attention.virtual import run_virtual
from ring_cases import Case, assert_exact, error, join, run_rank, truth

LAYOUTS = {
    "contiguous": Contiguous,
    "zigzag": Zigzag,
    "striped": Striped,
    "documents": lambda length, size: DocumentBalanced(
        [*(at for at in (0, 5, 6, 41) if at < length or at == 0), length], size
    ),
    "striped5": lambda length, size: Striped(length, size, block=5),
}
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(11, 0),
    "two-sided window": Window(7, 9),
    "documents": Causal() & Documents((0, 5, 6, 41, 61)),
    "prefix": PrefixLM(9),
    "chunks": Causal() & Chunks(13),
    "sink tokens": Causal() & (FirstTokens(3) | Window(8, 0)),
}
LENGTH = 61  # odd, prime, not a multiple of anything


# Ways to run a call on P ranks, as arguments of plan.
SCHEDULES: dict[str, dict[int, dict[str, Any]]] = {
    "direct": {size: {"generator": "direct"} for size in (2, 3, 4, 6)},
    "chain": {size: {"generator": "chain"} for size in (2, 3, 4, 6)},
    "two resident": {size: {"resident": 2} for size in (3, 4, 6)},
    "all resident": {size: {"resident": size} for size in (2, 4, 6)},
    "queries": {size: {"traveller": "q"} for size in (2, 3, 4)},
    "queries forward": {size: {"traveller": ("q", "kv")} for size in (4,)},
    "queries backward": {size: {"traveller": ("kv", "q"), "resident": 2} for size in (4, 6)},
    "one node": {size: {"ranks_per_node": size} for size in (2, 3)},
    "nodes of two": {size: {"ranks_per_node": 2} for size in (4, 6, 8)},
    "nodes of three": {size: {"ranks_per_node": 3} for size in (6, 9)},
    "nodes of four": {size: {"ranks_per_node": 4} for size in (8, 12)},
}
CASES = [(name, size) for name, sizes in SCHEDULES.items() for size in sizes]


def on_virtual_ranks(
    case: Case, world_size: int, layout: Layout, schedule: dict[str, Any] | None = None
):
    return join(run_virtual(world_size, run_rank, case, layout, None, schedule), layout)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_exact_on_virtual_ranks(mask: str, layout: str, world_size: int) -> None:
    case = Case(LENGTH, mask=MASKS[mask])
    assert_exact(on_virtual_ranks(case, world_size, LAYOUTS[layout](LENGTH, world_size)), case)


@pytest.mark.vm
@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("schedule,world_size", CASES)
def test_every_schedule_is_exact(schedule: str, world_size: int, mask: str) -> None:
    case = Case(LENGTH, mask=MASKS[mask], heads=4)
    layout = Zigzag(LENGTH, world_size)
    assert_exact(on_virtual_ranks(case, world_size, layout, SCHEDULES[schedule][world_size]), case)


@pytest.mark.parametrize(
    "case",
    [
        Case(3, k_len=LENGTH, mask=Full(), heads=6, kv_heads=2, sinks=True, dtype=torch.bfloat16),
        Case(LENGTH, heads=3, kv_heads=1, head_dim=24, v_head_dim=40, sinks=True),
        Case(LENGTH, softcap=2.0, mask=Window(7, 9), dtype=torch.bfloat16),
        Case(LENGTH, batch=2, mask=Causal() & KeyLength((61, 23))),
        Case(LENGTH, batch=3, mask=KeyLength((0, 1, 60)), sinks=True),
        Case(29, k_len=LENGTH, mask=Causal(bottom_right=True)),
    ],
    ids=["few queries", "mqa, dv != dqk", "softcap", "key length", "empty samples", "cross"],
)
@pytest.mark.parametrize("world_size", [2, 5])
def test_travelling_queries_are_exact_for_every_argument(case: Case, world_size: int) -> None:
    k_len = case.k_len or case.q_len
    q_layout, k_layout = Zigzag(case.q_len, world_size), Striped(k_len, world_size, block=2)
    parts = run_virtual(world_size, run_rank, case, q_layout, k_layout, {"traveller": "q"})
    assert_exact(join(parts, q_layout, k_layout), case)


@pytest.mark.vm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 4])
def test_exact_in_16_bit(dtype: torch.dtype, world_size: int) -> None:
    case = Case(LENGTH, dtype=dtype, heads=4, head_dim=32)
    assert_exact(on_virtual_ranks(case, world_size, Zigzag(LENGTH, world_size)), case)


@pytest.mark.vm
@pytest.mark.parametrize(
    "case",
    [
        Case(LENGTH, heads=6, kv_heads=2),
        Case(LENGTH, heads=3, kv_heads=1, head_dim=24, v_head_dim=40),
        Case(LENGTH, sinks=True, heads=4, kv_heads=2),
        Case(LENGTH, softcap=2.0),
        Case(LENGTH, batch=2, mask=Causal() & KeyLength((61, 23))),
        Case(LENGTH, batch=3, mask=KeyLength((0, 1, 60))),
        Case(LENGTH, sinks=True, mask=Causal() & Documents((0, 30, 61)), batch=2),
    ],
    ids=["gqa", "mqa, dv != dqk", "sinks", "softcap", "key length", "empty samples", "sinks+docs"],
)
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_exact_for_every_argument(case: Case, world_size: int) -> None:
    assert_exact(on_virtual_ranks(case, world_size, Zigzag(LENGTH, world_size)), case)


@pytest.mark.parametrize("length", [0, 1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_ranks_than_tokens(layout: str, length: int) -> None:
    case = Case(length)
    made = LAYOUTS[layout](length, 7)
    assert 0 in made.sizes
    got = on_virtual_ranks(case, 7, made)
    if length:
        assert_exact(got, case)


@pytest.mark.vm
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_cross_attention_with_two_layouts(world_size: int) -> None:
    case = Case(29, k_len=LENGTH, mask=Causal(bottom_right=True))
    q_layout, k_layout = Contiguous(29, world_size), Striped(LENGTH, world_size, block=2)
    parts = run_virtual(world_size, run_rank, case, q_layout, k_layout)
    assert_exact(join(parts, q_layout, k_layout), case)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(0, 90),
    world_size=st.integers(1, 6),
    layout=st.sampled_from(sorted(LAYOUTS)),
    mask=st.sampled_from(sorted(set(MASKS) - {"documents"})),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
)
def test_exact_for_random_problems(
    length: int, world_size: int, layout: str, mask: str, heads: tuple[int, int]
) -> None:
    case = Case(length, mask=MASKS[mask], heads=heads[0], kv_heads=heads[1])
    got = on_virtual_ranks(case, world_size, LAYOUTS[layout](length, world_size))
    if length:
        assert_exact(got, case)


# --- Real processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents", "sink tokens"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_exact_on_processes(pools, layout: str, mask: str, world_size: int) -> None:
    case = Case(LENGTH, mask=MASKS[mask], heads=4, kv_heads=2, sinks=True)
    made = LAYOUTS[layout](LENGTH, world_size)
    assert_exact(join(pools(world_size).run(run_rank, case, made), made), case)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("schedule", [name for name, size in CASES if size == 4])
def test_processes_and_virtual_ranks_agree_to_the_bit(pools, schedule: str, mask: str) -> None:
    case = Case(LENGTH, heads=4, kv_heads=2, dtype=torch.bfloat16, mask=MASKS[mask])
    layout = Zigzag(LENGTH, 4)
    real = pools(4).run(run_rank, case, layout, None, SCHEDULES[schedule][4])
    virtual = run_virtual(4, run_rank, case, layout, None, SCHEDULES[schedule][4])
    assert_exact(join(real, layout), case)
    for mine, theirs in zip(real, virtual, strict=True):
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


# --- Error, repeatability, bytes, memory ----------------------------------------------------------


@pytest.mark.vm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_flat_in_ring_size(dtype: torch.dtype) -> None:
    """One rounding at the end, however many blocks were folded: 16-bit partials would double it."""
    case = Case(256, mask=Full(), dtype=dtype, head_dim=32)
    want = truth(case)

    def rms(world_size: int, name: str) -> float:
        got = on_virtual_ranks(case, world_size, Contiguous(256, world_size))[name].double()
        return float((got - want[name]).square().mean().sqrt())

    for name in ("out", "dq", "dk", "dv"):
        alone = rms(1, name)
        for world_size in (2, 4, 8):
            assert rms(world_size, name) <= 1.15 * alone, (name, world_size)


def repeat(group, case: Case, layout: Layout, threads: int):
    torch.set_num_threads(threads)
    return run_rank(group, case, layout)


def test_bits_do_not_depend_on_threads(pools) -> None:
    case = Case(LENGTH, heads=4, kv_heads=2)
    layout = Zigzag(LENGTH, 2)
    one = pools(2).run(repeat, case, layout, 1)
    two = pools(2).run(repeat, case, layout, 2)
    pools(2).run(repeat, case, layout, 1)
    for mine, theirs in zip(one, two, strict=True):
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def test_only_rows_somebody_reads_are_sent() -> None:
    row_bytes = 2 * 2 * 16 * 4  # K and V of two heads, fp32
    length, size = 64, 4
    layout = Contiguous(length, size)

    def total_rows(mask: Mask) -> float:
        case = Case(length, mask=mask)
        return sum(forward_counts(case)) / row_bytes / 2  # every row is sent once, received once

    def forward_counts(case: Case) -> list[int]:
        counts: list[int] = []
        for rank in range(size):
            made = plan(case.mask, layout, rank=rank, generator="direct")
            rows = sum(
                end - begin
                for step in made.steps
                for t in (*step.sends, *step.recvs)
                for begin, end in t.rows
            )
            counts.append(rows * row_bytes)
        with trace.record() as events:
            run_virtual(size, run_rank, case, layout, None, {"generator": "direct"})
        for rank in range(size):
            posted = sum(
                e.bytes
                for e in events
                if e.rank == rank and e.name == "post" and e.phase == "forward"
            )
            assert posted == counts[rank]
        return counts

    assert total_rows(Full()) == (size - 1) * length
    assert total_rows(Causal()) == (3 + 2 + 1) * 16
    assert total_rows(Causal() & Window(4, 0)) == 3 * 4
    assert total_rows(Causal() & Documents((0, 16, 32, 48, 64))) == 0


def peak_buffers(group, length_per_rank: int, schedule: dict[str, Any] | None = None) -> int:
    """Most bytes a rank's ring had on loan at once."""
    from ring_attention import buffers

    peak = 0
    loan = 0
    lease, give_back = group.pool.lease, group.pool.give_back

    def counting_lease(*args, **kwargs) -> buffers.Lease:
        nonlocal peak, loan
        made = lease(*args, **kwargs)
        loan += made.raw.numel()
        peak = max(peak, loan)
        return made

    def counting_give_back(made: buffers.Lease) -> None:
        nonlocal loan
        loan -= made.raw.numel()
        give_back(made)

    group.pool.lease, group.pool.give_back = counting_lease, counting_give_back
    length = length_per_rank * group.size
    run_rank(group, Case(length, mask=Full()), Contiguous(length, group.size), None, schedule)
    assert loan == 0, "a buffer was not given back"
    return peak


def test_memory_does_not_depend_on_ring_size() -> None:
    block = 64 * 2 * 2 * 16 * 4  # K and V, or dK and dV, of a shard: fp32
    peaks = {size: max(run_virtual(size, peak_buffers, 64)) for size in (4, 5, 8)}
    # K/V held, packed and arriving; gradients accumulating, two going (one waits), one arriving.
    assert len(set(peaks.values())) == 1, peaks
    assert peaks[8] <= 7 * block


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_memory_grows_with_resident_blocks_alone(resident: int) -> None:
    block = 64 * 2 * 2 * 16 * 4
    schedule = {"resident": resident}
    peaks = {size: max(run_virtual(size, peak_buffers, 64, schedule)) for size in (10, 13)}
    assert len(set(peaks.values())) == 1, peaks
    assert (resident - 1) * 6 * block < peaks[10] <= 7 * resident * block


def test_memory_of_a_double_ring_does_not_depend_on_its_size() -> None:
    block = 64 * 2 * 2 * 16 * 4
    peaks = {
        (nodes, locals_): max(
            run_virtual(nodes * locals_, peak_buffers, 64, {"ranks_per_node": locals_})
        )
        for nodes, locals_ in ((4, 3), (5, 3), (4, 4), (5, 4))
    }
    # As a ring, and: the block kept in a round and the next one, packed for the other node, and the
    # gradients summed for the node, those going back and those coming back.
    assert max(peaks.values()) <= 11 * block, peaks
    assert peaks[4, 3] == peaks[5, 3] and peaks[4, 4] == peaks[5, 4], peaks


def test_a_virtual_rank_that_fails_wakes_the_others() -> None:
    def fn(group) -> None:
        if group.rank == 1:
            raise ValueError("my own mistake")
        run_rank(group, Case(16), Contiguous(16, group.size))

    with pytest.raises(ValueError, match="my own mistake"):
        run_virtual(3, fn)


def test_virtual_ranks_refuse_messages_of_different_sizes() -> None:
    def fn(group) -> None:
        # A plan of another length on one rank, smuggled past the agreement.
        length = 16 if group.rank else 20
        made = plan(Full(), Contiguous(length, 2), rank=group.rank)
        q, k, v = (torch.randn(1, 1, length // 2, 16) for _ in range(3))
        ring_cases.loop_forward(made, group, q, k, v)

    with pytest.raises(RuntimeError, match="their plans differ"):
        run_virtual(2, fn)


def test_reference_and_error_can_fail() -> None:
    case = Case(LENGTH)
    got = truth(case)
    got["out"] = got["out"] + 1e-3
    with pytest.raises(AssertionError, match="out: error"):
        assert_exact(got, case)
    assert error(got["dq"], got["dq"]) == 0.0


def posted(group) -> list[str]:
    """What this rank does with messages, in order: packing, and handing them to the backend."""
    order: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (messages, "_pack"),
            (torch.distributed, "isend"),
            (torch.distributed, "irecv"),
        ):
            call = getattr(owner, name)

            def noted(*args, call=call, name=name, **kwargs):
                order.append(name)
                return call(*args, **kwargs)

            patch.setattr(owner, name, noted)
        run_rank(group, Case(LENGTH, mask=Full()), Contiguous(LENGTH, group.size()))
    return order


def test_receives_are_posted_before_sends_are_packed(pools) -> None:
    # Otherwise the two directions of a link between gloo processes take turns, and gloo's thread
    # spins while a rank writes.
    blocks = ["irecv", "_pack", "isend"]
    for order in pools(2).run(posted):
        assert order == [*blocks, *blocks, "irecv", "isend"]  # gradients lie packed
