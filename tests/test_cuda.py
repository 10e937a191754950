# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show of the ring: NCCL, streams, captured graphs, a host that never waits.

The rest of a GPU's tests are those of the operators and the ring, on its tensors: `make gpu`. Ranks
may share a GPU: NCCL takes them for several hosts (ranks.py) and sends by sockets.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from conftest import DEVICE
from ranks import RankPool
from ring_attention import RingAttention, agree, attention
from ring_attention.layout import Zigzag
from ring_attention.mask import Causal, Full, Window
from ring_attention.plan import plan
from ring_attention.virtual import run_virtual
from ring_cases import Case, Results, assert_exact, join, run_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="make gpu runs it, where there is a GPU"),
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "direct": {"generator": "direct"},
    "chain": {"generator": "chain"},
    "resident": {"resident": 2},
    "queries": {"traveller": "q"},
    "invariant": {"invariant": True},
}
LENGTH = 384
CASES = {
    "full": Case(LENGTH, mask=Full(), heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16),
    "causal": Case(LENGTH, heads=2, head_dim=128, dtype=torch.float16, sinks=True),
    "softcap": Case(LENGTH, head_dim=64, dtype=torch.bfloat16, sinks=True, softcap=5.0),
    "window": Case(LENGTH, mask=Causal() & Window(100, 0), head_dim=64, dtype=torch.float32),
}


@pytest.fixture(scope="module")
def nccl() -> Iterator[RankPool]:
    pool = RankPool(2, "nccl")
    yield pool
    pool.close()


def on_cpu(results: Results) -> Results:
    return {name: x.cpu() for name, x in results.items()}


def rank_on_nccl(group: Any, *args: Any) -> Results:
    return on_cpu(run_rank(group, *args))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nccl_and_virtual_ranks_agree_to_the_bit(nccl: RankPool, schedule: str, name: str) -> None:
    case, layout = CASES[name], Zigzag(LENGTH, 2)
    args = (case, layout, None, SCHEDULES[schedule])
    real = nccl.run(rank_on_nccl, *args)
    virtual = run_virtual(2, run_rank, *args)
    assert_exact(join([{n: x.to(DEVICE) for n, x in part.items()} for part in real], layout), case)
    for mine, theirs in zip(real, map(on_cpu, virtual), strict=True):
        for what in mine:
            assert torch.equal(mine[what], theirs[what]), what


def warm_up(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What a captured call needs before: some runs on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results = run()
    torch.cuda.synchronize()
    return [x.clone() for x in results]


class Shard:
    """One rank's part of a call whose plan is agreed on; `run` may be captured."""

    def __init__(self, group: Any, case: Case) -> None:
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        layout = Zigzag(case.q_len, size)
        made = case.tensors()
        self.group, self.softcap = group, case.softcap
        self.inputs = {
            name: layout.shard(made[name], rank, dim=2).contiguous()
            for name in ("q", "k", "v", "dout")
        }
        if case.sinks:
            self.inputs["sinks"] = made["sinks"]
        self.plan = plan(case.mask, layout, group=group)
        if group is not None:
            agree(self.plan, group, *(self.inputs[name] for name in "qkv"))

    def run(self) -> list[torch.Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in self.inputs.items() if n != "dout"}
        how: dict[str, Any] = {"plan": self.plan, "group": self.group, "softcap": self.softcap}
        out = attention(**leaves, **how)
        return [out.detach(), *torch.autograd.grad(out, [*leaves.values()], self.inputs["dout"])]

    def warm_up(self) -> list[torch.Tensor]:
        return warm_up(self.run)


def replays_are_calls(group: Any, case: Case) -> list[bool]:
    """Whether a captured graph gives the bits of a call, on the inputs it saw and on others."""
    shard = Shard(group, case)
    before = shard.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = shard.run()
    same = []
    for other in (False, True):
        if other:
            for x in shard.inputs.values():
                x.mul_(-0.75)
            before = shard.warm_up()
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        same += [torch.equal(a, b) for a, b in zip(captured, before, strict=True)]
    return same


@pytest.mark.parametrize("name", CASES)
def test_captured_graphs(name: str) -> None:
    assert all(replays_are_calls(None, CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_captured_graphs_on_nccl(nccl: RankPool, name: str) -> None:
    assert all(all(same) for same in nccl.run(replays_are_calls, CASES[name]))


def test_a_captured_layer(nccl: RankPool) -> None:
    assert all(nccl.run(layer_replays))


def layer_replays(group: Any) -> bool:
    """A whole layer with rotary positions, forward and backward, replayed on other inputs."""
    torch.manual_seed(0)
    layout = Zigzag(256, group.size())
    layer = RingAttention(128, 2, rope=1e4, qk_norm=True, group=group, device="cuda")
    made = plan(layer.effective_mask(), layout, group=group)
    whole = torch.randn(2, 1, 256, 128, device="cuda")
    x, dy = (layout.shard(y, group) for y in whole)

    def run() -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf, plan=made)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]

    agree(made, group, *(torch.empty(1, 2, x.shape[1], 64, device="meta") for _ in range(3)))
    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(-0.5)
    graph.replay()
    expected = run()
    return all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def without_waiting(group: Any, case: Case) -> int:
    """Runs a warm call while torch refuses every wait of the host for the GPU."""
    shard = Shard(group, case)
    wanted = shard.warm_up()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = shard.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum(not torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing(nccl: RankPool, name: str) -> None:
    assert without_waiting(None, CASES[name]) == 0
    assert nccl.run(without_waiting, CASES[name]) == [0, 0]


def behind_a_late_stream(group: Any, case: Case) -> int:
    """Inputs that are written late, on the stream of the call: whatever does not wait reads NaN."""
    shard = Shard(group, case)
    wanted = shard.warm_up()
    kept = {name: x.clone() for name, x in shard.inputs.items()}
    for x in shard.inputs.values():
        x.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # clock cycles
        for name, x in shard.inputs.items():
            x.copy_(kept[name])
        got = shard.run()
    torch.cuda.synchronize()
    return sum(not torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_call_is_ordered_by_its_stream(nccl: RankPool, name: str) -> None:
    assert behind_a_late_stream(None, CASES[name]) == 0
    assert nccl.run(behind_a_late_stream, CASES[name]) == [0, 0]
