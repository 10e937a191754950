# SPDX-License-Identifier: BSD-3-Clause
"""invariant=: the same bits for every number of ranks, and refused where that cannot be."""

import gc
import re
import threading
import weakref
from collections import defaultdict
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention import Machine, RingAttention, Shapes, attention, pending, predict
from ring_attention.layout import Contiguous, DocumentBalanced, Layout, Striped, Zigzag
from ring_attention.mask import Causal, Documents, FirstTokens, Full, KeyLength, Window
from ring_attention.plan import plan
from ring_attention.tree import Tree, Trees
from ring_attention.virtual import run_virtual
from ring_cases import Case, Results, assert_exact, join, run_rank
from strategies import masks

N = 128
CASES = {
    "causal": Case(N, heads=4),
    "full": Case(N, mask=Full(), heads=3, kv_heads=1, v_head_dim=24, sinks=True),
    "window": Case(N, mask=Causal() & Window(11, 0), dtype=torch.bfloat16, heads=4),
    "two-sided window": Case(N, mask=Window(20, 9), softcap=2.0, sinks=True),
    "documents": Case(N, mask=Causal() & Documents((0, 5, 6, 41, 90, N)), dtype=torch.bfloat16),
    "lengths": Case(N, mask=Causal() & KeyLength((N, 23, 0)), batch=3, sinks=True),
    "two intervals": Case(N, mask=Causal() & (FirstTokens(3) | Window(8, 0)), heads=4),
    "cross": Case(64, k_len=N, mask=Causal(bottom_right=True), dtype=torch.float16),
    "float64": Case(N, dtype=torch.float64, heads=1, kv_heads=1),
    "many blocks": Case(1024, mask=Full(), heads=1, kv_heads=1, dtype=torch.bfloat16),
}


def sharded(
    case: Case, size: int, kind: Any = Contiguous, pool: Any = None, **schedule: Any
) -> Results:
    q_layout, k_layout = kind(case.q_len, size), kind(case.k_len or case.q_len, size)
    args = (case, q_layout, k_layout, {"invariant": True, **schedule})
    parts = run_virtual(size, run_rank, *args) if pool is None else pool.run(run_rank, *args)
    return join(parts, q_layout, k_layout)


@lru_cache(maxsize=1)
def alone(case: Case) -> Results:
    return sharded(case, 1)


def assert_same_bits(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()

    def bits(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(torch.uint8)

    different = [name for name in want if not torch.equal(bits(got[name]), bits(want[name]))]
    assert not different


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_virtual_ranks_and_exact(name: str) -> None:
    case = CASES[name]
    if case.dtype != torch.float64:
        assert_exact(alone(case), case)
    for size, kind in ((2, Contiguous), (2, Zigzag), (4, Zigzag), (8, Contiguous), (8, Zigzag)):
        assert_same_bits(sharded(case, size, kind), alone(case))


@pytest.mark.parametrize("name", ["full", "lengths"])
def test_same_bits_on_processes(pools: Any, name: str) -> None:
    case = CASES[name]
    for size, kind in ((2, Zigzag), (4, Contiguous), (4, Zigzag)):
        assert_same_bits(sharded(case, size, kind, pools(size)), alone(case))


def test_other_bits_without() -> None:
    case = CASES["full"]

    def plain(size: int) -> Results:
        layout = Zigzag(N, size)
        return join(run_virtual(size, run_rank, case, layout), layout)

    one, two = plain(1), plain(2)
    assert all(not torch.equal(one[name], two[name]) for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize(
    "schedule",
    [{"generator": "chain"}, {"resident": 2}, {"resident": 3}],
    ids=lambda schedule: "-".join(map(str, schedule.values())),
)
def test_same_bits_for_every_schedule(schedule: dict[str, Any]) -> None:
    case = CASES["two-sided window"]
    assert_same_bits(sharded(case, 4, Zigzag, **schedule), alone(case))


def test_tiles_in_any_hands() -> None:
    """Any layout of whole tiles will do, also one with an empty shard."""
    case = CASES["two-sided window"]
    for size, block in ((3, 8), (4, 64)):
        assert_same_bits(
            sharded(case, size, lambda n, p, block=block: Striped(n, p, block)), alone(case)
        )


@pytest.mark.vm
@pytest.mark.parametrize("tiles,size,kind", [(2, 2, Contiguous), (4, 2, Zigzag), (32, 8, Zigzag)])
def test_other_numbers_of_tiles(tiles: int, size: int, kind: Any) -> None:
    case = Case(64, mask=Window(20, 9))
    got = sharded(case, size, kind, invariant=tiles)
    assert_exact(got, case)
    assert_same_bits(got, sharded(case, 1, invariant=tiles))


@settings(max_examples=8)
@given(mask=masks(32, 32), size=st.sampled_from([2, 4]), kind=st.sampled_from([Contiguous, Zigzag]))
def test_same_bits_for_random_masks(mask: Any, size: int, kind: Any) -> None:
    case = Case(32, mask=mask, batch=max(mask.batch, 1), heads=2, kv_heads=1, sinks=True)
    assert_same_bits(sharded(case, size, kind, invariant=8), sharded(case, 1, invariant=8))


@settings(max_examples=40)
@given(mask=masks(32, 64), size=st.sampled_from([1, 2, 4]))
def test_plans_count_what_is_visible_and_send_whole_tiles(mask: Any, size: int) -> None:
    q_layout, k_layout = Zigzag(32, size), Contiguous(64, size)
    how: dict[str, Any] = {"q_layout": q_layout, "k_layout": k_layout}
    plans = [plan(mask, rank=r, invariant=8, **how) for r in range(size)]
    tiles = plans[0].tiles
    assert tiles is not None
    dense = mask.dense(32, 64)
    brute = dense.view(len(dense), 8, 4, 8, 8).sum((0, 2, 4))
    same_samples = len(dense) // plans[0]._reads.samples
    assert torch.equal(torch.tensor(tiles.pairs) * same_samples, brute)
    for r, p in enumerate(plans):
        assert sum(p.flops) == sum(plan(mask, rank=r, **how).flops)
        pieces = [t.num_rows for s in p.steps for t in (*s.recvs, *s.grad_sends)]
        assert all(rows and rows % tiles.k_rows == 0 for rows in pieces)


@given(
    tiles=st.sets(st.integers(0, 15), min_size=1), cuts=st.sets(st.integers(1, 15)), data=st.data()
)
def test_tree_does_not_depend_on_order_or_hands(
    tiles: set[int], cuts: set[int], data: st.DataObject
) -> None:
    """Values are the texts of their own sums, so what is joined with what is seen."""

    def add(left: str, right: str) -> str:
        return f"({left} {right})"

    def whole(nodes: list[tuple[int, str]]) -> dict[int, str]:
        tree: Tree[str] = Tree(16, tiles, add)
        for node, value in nodes:
            tree.add_node(node, value)
        return tree.pending

    leaves = [(16 + t, str(t)) for t in sorted(tiles)]
    want = whole(leaves)
    assert list(want) == [1] and re.findall(r"\d+", want[1]) == [str(t) for t in sorted(tiles)]
    assert whole(data.draw(st.permutations(leaves))) == want
    hands = [
        [leaf for leaf in leaves if sum(leaf[0] - 16 >= c for c in cuts) == h] for h in range(16)
    ]
    sent = [node for hand in hands for node in whole(hand).items()]
    assert whole(data.draw(st.permutations(sent))) == want


def test_sinks_gradient_is_whole_on_the_first_rank() -> None:
    case = CASES["full"]
    layout = Zigzag(N, 4)
    parts = run_virtual(4, run_rank, case, layout, None, {"invariant": True})
    assert parts[0]["dsinks"].abs().sum() > 0
    assert not any(part["dsinks"].any() for part in parts[1:])


def test_strides_do_not_matter() -> None:
    q, k, v = (torch.randn(2, N, 4, 32, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    strided = attention(q, k, v, invariant=True)
    assert torch.equal(strided, attention(*(x.contiguous() for x in (q, k, v)), invariant=True))


def test_arguments_say_the_same() -> None:
    q, k, v = (torch.randn(1, 2, N, 16) for _ in range(3))
    made = plan(Causal(), Contiguous(N, 1), invariant=True)
    want = attention(q, k, v, plan=made)
    for how in ({}, {"plan": made}, {"layout": Contiguous(N, 1)}):
        assert torch.equal(attention(q, k, v, invariant=True, **how), want)
    assert "invariant over 16 tiles" in made.explain()
    assert made.digest not in {
        plan(Causal(), Contiguous(N, 1), invariant=how).digest for how in (False, 8)
    }
    with pytest.raises(
        ValueError, match=r"expected a plan with invariant=8, got .* pass invariant"
    ):
        attention(q, k, v, plan=made, invariant=8)
    layer = RingAttention(32, 2, invariant=True)
    x = torch.randn(1, N, 32)
    assert torch.equal(layer(x), layer(x, plan=made))
    with pytest.raises(ValueError, match="expected a plan with invariant=True"):
        layer(x, plan=plan(Causal(), Contiguous(N, 1)))


def test_ranks_that_differ_are_told() -> None:
    def rank(group: Any, case: Case) -> None:
        run_rank(group, case, Zigzag(N, 2), None, {"invariant": 8 if group.rank else False})

    with pytest.raises(RuntimeError, match="ranks disagree about invariant"):
        run_virtual(2, rank, CASES["causal"])


@pytest.mark.parametrize(
    "layout,at",
    [
        (Striped(N, 2), 0),
        (Striped(N, 2, block=3), 0),
        (Contiguous(N, 3), 43),
        (Contiguous(N, 32), 4),
        (Zigzag(N, 16), 4),
        (DocumentBalanced([0, 5, 41, N], 2), None),
    ],
    ids=repr,
)
def test_layouts_that_cut_tiles_are_refused(layout: Layout, at: int | None) -> None:
    with pytest.raises(ValueError, match="q_layout to be cut at tiles of 8 positions") as error:
        plan(Causal(), layout, rank=0, invariant=True)
    assert repr(layout) in str(error.value) and "Zigzag on up to 8" in str(error.value)


@pytest.mark.parametrize(
    "how,expected",
    [
        ({"layout": Contiguous(100, 1)}, "q_layout.length to be a multiple of the 16 tiles"),
        ({"layout": Contiguous(0, 1)}, "q_layout.length to be a multiple of the 16 tiles"),
        ({"traveller": "q"}, "K/V to travel with invariant"),
        ({"ulysses": 2}, "ulysses == 1 with invariant"),
        ({"ranks_per_node": 2}, "one ring with invariant"),
        ({"invariant": 12}, "True, False or a power of two"),
        ({"invariant": 0}, "True, False or a power of two"),
    ],
)
def test_refused(how: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        plan(Causal(), **{"layout": Zigzag(N, 4), "rank": 0, "invariant": True, **how})


@pytest.mark.parametrize("size,kind", [(1, Contiguous), (2, Zigzag), (4, Contiguous), (4, Zigzag)])
@pytest.mark.parametrize("name", ["causal", "two-sided window"])
def test_predicted_memory_is_what_trees_hold(
    name: str, size: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    made: dict[str, list[int]] = defaultdict(list)  # buffers of each Trees, by thread
    buffers: list[weakref.ref[torch.Tensor]] = []
    begin = Trees.__init__

    def counting(self: Trees, count: int, leaves: Any, make: Any, join: Any) -> None:
        numbers = made[threading.current_thread().name[-1]]
        at = len(numbers)
        numbers.append(0)

        def counted() -> Any:
            numbers[at] += 1
            value = make()
            buffers.extend(map(weakref.ref, value))
            return value

        begin(self, count, leaves, counted, join)

    monkeypatch.setattr(Trees, "__init__", counting)
    gc.disable()
    try:
        sharded(case, size, kind)
        assert not any(buffer() is not None for buffer in buffers)
    finally:
        gc.enable()
    k_bytes = (case.head_dim + (case.v_head_dim or case.head_dim)) * case.kv_heads * 4
    for rank in range(size):
        p = plan(case.mask, kind(N, size), rank=rank, invariant=True)
        split = p.own_split(k_bytes, k_bytes)  # of float32, as the sums are
        assert made[str(rank)] == [pending.states(p), *pending.sums(p, split)]
        # Of each row of tiles the square in hand has one dQ and the pair in hand one. What came
        # before is up to two stretches of the sequence for each run of tiles that a rank holds, and
        # either end of a stretch has at most a node for each halving of the ranks.
        assert p.tiles is not None
        rows, runs = len(p.tiles.q_held[rank]), 2 if kind is Zigzag else 1
        most = 2 + 2 * runs * (size.bit_length() - 1)
        assert pending.sums(p, split)[0] <= (2 if size <= 2 else most) * rows + 1


def test_predictions_count_what_waits_and_what_goes_home() -> None:
    shapes, machine = Shapes(8, 8, 64), Machine("H100", "400G")
    layout = Zigzag(4096, 4)
    ordinary = predict(Full(), layout, shapes, machine, generator="direct", traveller="kv")
    predicted = plan(Full(), layout, rank=0, shapes=shapes, machine=machine, invariant=True)
    found = predicted.prediction
    assert found is not None and found.schedule["invariant"] == 16
    assert "invariant=16" in predicted.explain()
    assert found.memory_bytes > ordinary.memory_bytes and found.seconds > ordinary.seconds
    # Two sums of every key tile that another rank reads, instead of one.
    home = [sum(t.num_rows for s in predicted.steps for t in s.grad_sends)]
    assert home == [2 * 3 * 1024]
    sent = found.backward[0].sent_bytes - ordinary.backward[0].sent_bytes
    assert sent == shapes.grad_bytes(3 * 1024)
