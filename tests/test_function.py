# SPDX-License-Identifier: BSD-3-Clause
"""The communicating operators as torch sees them: groups, compiler, checkpointing, opcheck."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ring_attention import agree, attention, registry, trace
from ring_attention.groups import transport_of
from ring_attention.layout import Contiguous, Striped, Zigzag
from ring_attention.mask import Causal, Documents, Full
from ring_attention.plan import plan
from ring_attention.virtual import run_virtual
from ring_cases import Case, Results, assert_exact, error, join, run_rank

LENGTH = 37


def shards(group: Any, length: int, seed: int = 0) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    whole = [torch.randn(1, 2, length, 16, generator=gen) for _ in range(3)]
    layout = Zigzag(length, transport_of(group).size)
    return [layout.shard(x, group, dim=2).requires_grad_() for x in whole]


# --- Tables of plans ------------------------------------------------------------------------------


def under_another_default(group: Any, *args: Any) -> Results:
    with torch.device("meta"):
        return run_rank(group, *args)


@pytest.mark.parametrize("schedule", [{}, {"traveller": "q"}, {"invariant": True}], ids=str)
def test_what_torch_makes_by_default_is_not_where_tables_are(schedule: dict[str, Any]) -> None:
    """Planners fill them on the host: torch.set_default_device("cuda") must not move them."""
    mask = Causal() & Documents((0, 5, 6, 41, 64))
    args = (Case(64, mask=mask), Striped(64, 4, block=8), None, schedule)
    plain = run_virtual(4, run_rank, *args)
    with torch.device("meta"):
        assert Striped(64, 4).positions(3).device.type == "cpu"
        assert Documents.from_ids([7, 7, 3, -1]).cu_seqlens == ((0, 2, 3, 4),)
        ids = torch.tensor([0, 1, 2, 0, 1], device="cpu")
        assert Documents.from_positions(ids).cu_seqlens == ((0, 3, 5),)
        assert mask.dense(64, 64).device.type == "cpu"
        shard = Zigzag(64, 4).shard(torch.arange(64, device="cpu"), 1, dim=0)
    assert torch.equal(shard, Zigzag(64, 4).positions(1))
    for mine, theirs in zip(run_virtual(4, under_another_default, *args), plain, strict=True):
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


# --- Groups ---------------------------------------------------------------------------------------


def in_subgroups(world: Any, case: Case) -> Results:
    """Ranks 0 and 2 are one ring, ranks 3 and 1 another; both run at once."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    mine = groups[0] if dist.get_rank() in (0, 2) else groups[1]
    results = run_rank(mine, case, Zigzag(LENGTH, 2))
    results["group rank"] = torch.tensor(dist.get_rank(mine))
    return results


def test_subgroups_of_a_larger_world(pools) -> None:
    case = Case(LENGTH)
    parts = pools(4).run(in_subgroups, case)
    for members in ((0, 2), (1, 3)):
        ring = sorted((parts[rank] for rank in members), key=lambda p: int(p["group rank"]))
        for part in ring:
            del part["group rank"]
        assert_exact(join(ring, Zigzag(LENGTH, 2)), case)


def in_mesh(world: Any, case: Case) -> Results:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    layout = Zigzag(LENGTH, 2)
    results = run_rank(mesh, case, layout)
    one = run_rank(mesh["cp"], case, layout)
    assert all(torch.equal(results[name], one[name]) for name in results)
    with pytest.raises(ValueError, match='one with a dimension "cp"'):
        run_rank(init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), case, layout)
    return results


def test_device_mesh(pools) -> None:
    case = Case(LENGTH)
    parts = pools(4).run(in_mesh, case)
    assert_exact(join(parts[:2], Zigzag(LENGTH, 2)), case)
    assert_exact(join(parts[2:], Zigzag(LENGTH, 2)), case)


def outside(world: Any) -> bool:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        return True
    q, k, v = (torch.ones(1, 1, 4, 16) for _ in range(3))
    with pytest.raises(ValueError, match="expected group to contain this rank"):
        attention(q, k, v, group=group, layout=Contiguous(4, 1))
    return True


def test_a_group_without_this_rank_is_refused(pools) -> None:
    assert all(pools(2).run(outside))


def alone_in_a_world(world: Any) -> bool:
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    calls = transport_of(world).book.calls
    attention(q, k, v)
    return transport_of(world).book.calls == calls


def test_no_group_is_this_process_only(pools) -> None:
    assert all(pools(2).run(alone_in_a_world))


# --- The compiler ---------------------------------------------------------------------------------


def two_calls(plans: Any, group: Any, long: Any, short: Any) -> torch.Tensor:
    """Two independent ring calls, whose shards differ in size differently on every rank."""
    out = attention(*long, plan=plans[0], group=group)
    other = attention(*short, plan=plans[1], group=group)
    return out.square().sum() + other.sin().sum()


def compiled(group: Any) -> list[tuple[str, int, int]]:
    """Runs eagerly and compiled, for changing lengths; returns the order of the messages."""
    step = torch.compile(two_calls, fullgraph=True, backend="aot_eager")
    orders = []
    for lengths in ((LENGTH, 12), (12, LENGTH), (30, 31)):
        plans, inputs = [], []
        for seed, length in enumerate(lengths):
            inputs.append(shards(group, length, seed))
            plans.append(plan(Causal(), Zigzag(length, transport_of(group).size), group=group))
            agree(plans[-1], group, *inputs[-1])
        leaves = [x for xs in inputs for x in xs]
        want = torch.autograd.grad(two_calls(plans, group, *inputs), leaves)
        with trace.record() as events:
            got = torch.autograd.grad(step(plans, group, *inputs), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        orders.append([(e.phase, e.step, e.bytes) for e in events if e.name == "post"])
    return orders


def test_compiled_calls_keep_their_order_on_every_rank(pools) -> None:
    orders = pools(2).run(compiled)
    # What one of two ranks sends, the other receives: the byte sequences are the same.
    assert orders[0] == orders[1]
    assert all(len(order) >= 4 for order in orders[0])


# --- Checkpointing --------------------------------------------------------------------------------


def checkpointed(group: Any, save: bool) -> int:
    """How many forward rings a checkpointed block runs in forward and backward."""
    q, k, v = shards(group, LENGTH)
    layout = Zigzag(LENGTH, transport_of(group).size)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q.sin(), k, v, group=group, layout=layout).sin()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ring = op is torch.ops.ring_attention.ring_forward.default
        return CheckpointPolicy.MUST_SAVE if ring else CheckpointPolicy.PREFER_RECOMPUTE

    how = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if save else {}
    with trace.record() as events:
        checkpoint(block, q, k, v, use_reentrant=False, **how).sum().backward()
    posts = [e for e in events if e.name == "post" and e.phase == "forward"]
    return len({e.start_s for e in posts})


def test_selective_checkpointing_runs_the_ring_once(pools) -> None:
    assert pools(2).run(checkpointed, True) == [1, 1]
    assert pools(2).run(checkpointed, False) == [2, 2]


def kinds(group: Any, heads: int, kv_heads: int, how: dict[str, Any]) -> dict[str, set[str]]:
    """What a call sends, forward and backward, without a plan or with one."""
    layout = Zigzag(LENGTH, group.size)
    rows = layout.sizes[group.rank]
    q, k, v = (torch.randn(2, h, rows, 16, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    made: dict[str, Any] = {"plan": plan(Causal(), layout, group=group, **how)} if how else {}
    made = made or {"layout": layout}
    with trace.record() as events:
        out = attention(q, k, v, group=group, **made)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
    sent: dict[str, set[str]] = {"forward": set(), "backward": set()}
    for event in events:
        sent[event.phase] |= {leg.kind for leg in event.legs}
    return sent


@pytest.mark.parametrize(
    "heads,kv_heads,how,backward",
    [
        (4, 4, {}, {"Q", "dQ"}),  # as many heads of keys: two thirds of the bytes
        (4, 1, {}, {"K/V", "dK/dV"}),
        (4, 4, {"traveller": "kv"}, {"K/V", "dK/dV"}),
        (4, 1, {"traveller": ("kv", "q")}, {"Q", "dQ"}),
    ],
)
def test_what_travels_is_chosen_for_a_call_and_can_be_said(
    heads: int, kv_heads: int, how: dict[str, Any], backward: set[str]
) -> None:
    for sent in run_virtual(2, kinds, heads, kv_heads, how):
        assert sent == {"forward": {"K/V"}, "backward": backward}


# --- As operators ---------------------------------------------------------------------------------


def test_opcheck() -> None:
    made = plan(Causal(), Contiguous(9, 1), rank=0)
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, requires_grad=True)
    arguments = (q, k, v, sinks, made.handle, 0.25, 0.0, "local")
    torch.library.opcheck(torch.ops.ring_attention.ring_forward.default, arguments)
    out, lse = torch.ops.ring_attention.ring_forward(*arguments)
    saved = [x.detach() for x in (out, torch.randn_like(lse), q, k, v, out, lse, sinks)]
    torch.library.opcheck(torch.ops.ring_attention.ring_backward.default, (*saved, *arguments[4:]))


def test_double_backward_is_refused() -> None:
    def fn(group: Any) -> None:
        q, k, v = shards(group, LENGTH)
        out = attention(q, k, v, group=group, layout=Zigzag(LENGTH, 2))
        (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            dq.sum().backward()

    run_virtual(2, fn)


def test_the_plan_lives_until_the_backward() -> None:
    q, k, v = (torch.randn(1, 1, 8, 16, requires_grad=True) for _ in range(3))

    def out() -> torch.Tensor:
        made = plan(Full(), Contiguous(8, 1), rank=0)
        return torch.ops.ring_attention.ring_forward(
            q, k, v, None, made.handle, 0.25, 0.0, "local"
        )[0]

    kept = out()
    for _ in range(registry.KEPT_PLANS + 1):
        plan(Full(), Contiguous(8, 1), rank=0)
    kept.sum().backward()
    assert q.grad is not None and error(q.grad, q.grad) == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradient_through_lse_alone(world_size: int) -> None:
    def fn(group: Any) -> None:
        q, k, v = shards(group, LENGTH)
        _, lse = attention(q, k, v, group=group, layout=Zigzag(LENGTH, world_size), return_lse=True)
        dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
        assert dq.abs().sum() > 0 and dk.abs().sum() > 0
        assert dv.abs().sum() == 0

    run_virtual(world_size, fn)
