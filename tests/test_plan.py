# SPDX-License-Identifier: BSD-3-Clause
"""Plans by hand, as values, and what is refused."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plan_run import schedules
from ring_attention.layout import LAYOUTS, Contiguous, Layout, Striped, Zigzag
from ring_attention.mask import (
    Causal,
    Documents,
    FirstTokens,
    Full,
    KeyLength,
    Window,
)
from ring_attention.plan import GENERATORS, Plan, plan
from ring_attention.shapes import Shapes

# The package's attribute of this name is the function.
plan_module = importlib.import_module("ring_attention.plan")


def steps_of(p: Plan) -> list[tuple[tuple[int, ...], list[Any], list[Any]]]:
    return [
        (s.folds, [(t.peer, t.rows) for t in s.sends], [(t.peer, t.rows) for t in s.recvs])
        for s in p.steps
    ]


def test_by_hand() -> None:
    window = plan(Window(2, 0), Contiguous(12, 3), rank=1)
    assert steps_of(window) == [
        ((1,), [(2, ((2, 4),))], [(0, ((2, 4),))]),
        ((0,), [], []),
    ]
    assert [t.rows for t in window.steps[1].grad_sends] == [((0, 2),)]
    assert [t.rows for s in window.steps for t in s.grad_recvs] == [((2, 4),)]
    assert window.steps[1].release == (0,)
    assert window.flops == (9, 3) and window.rows == (2, 0)
    begin, end = window.intervals(0)
    assert begin.tolist() == [[[0, 1, 0, 0]]] and end.tolist() == [[[2, 2, 0, 0]]]

    alone = plan(Causal() & Documents([0, 4, 8, 12]), Contiguous(12, 3), rank=1)
    assert steps_of(alone) == [((1,), [], [])]

    # Positions 0, 4, 8, 12 see 0, 2..4, 6..8, 10..12: rows of ranks 2 and 3, and none of rank 1.
    gaps = plan(Window(2, 0), Striped(16, 4), rank=0)
    assert sorted(o for s in gaps.steps for o in s.folds) == [0, 2, 3]

    first = plan(Causal(), Contiguous(4, 2), rank=0)
    assert steps_of(first) == [((0,), [(1, ((0, 2),))], [])]
    assert [t.peer for t in first.steps[0].grad_recvs + first.steps[-1].grad_recvs] == [1, 1]


def test_one_rank_and_nothing_at_all() -> None:
    p = plan(Causal(), Contiguous(5, 1))
    assert steps_of(p) == [((0,), [], [])] and p.flops == (15,)
    assert steps_of(plan(Causal(), Contiguous(0, 1))) == [((), [], [])]
    assert steps_of(plan(Causal() & KeyLength(0), Zigzag(9, 3), rank=2)) == [((), [], [])]
    cross = plan(Full(), q_layout=Contiguous(0, 2), k_layout=Contiguous(8, 2), rank=1)
    assert steps_of(cross) == [((), [], [])]


def test_digest_is_the_same_everywhere() -> None:
    code = (
        "from ring_attention.plan import plan; from ring_attention.layout import Zigzag;"
        "from ring_attention.mask import Causal, Documents;"
        "print(plan(Causal() & Documents([0, 4, 9]), Zigzag(9, 3), rank=2).digest)"
    )
    here = plan(Causal() & Documents([0, 4, 9]), Zigzag(9, 3), rank=0).digest
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(there.stdout) == here and 0 <= here < 2**63


def test_digest_tells_plans_apart() -> None:
    documents = Causal() & Documents([0, 4, 9])
    plans = [
        plan(documents, Zigzag(9, 3), rank=0),
        plan(Causal() & Documents([0, 5, 9]), Zigzag(9, 3), rank=0),
        plan(documents, Zigzag(9, 3), rank=0, generator="chain"),
        plan(documents, Zigzag(9, 3), rank=0, resident=2),
        plan(documents, Zigzag(9, 3), rank=0, ulysses=3),
        plan(documents, Zigzag(9, 3), rank=0, traveller=("kv", "q")),
        plan(documents, Zigzag(9, 3), rank=0, ranks_per_node=3),
        plan(documents, Contiguous(9, 3), rank=0),
        plan(documents, Striped(9, 3), rank=0),
        plan(documents, Striped(9, 3, 2), rank=0),
        plan(documents, Zigzag(9, 1), rank=0),
        plan(documents, q_layout=Zigzag(9, 3), k_layout=Contiguous(9, 3), rank=0),
        plan(documents, q_layout=Contiguous(9, 3), k_layout=Zigzag(9, 3), rank=0),
    ]
    assert len({p.digest for p in plans}) == len(plans)
    assert plan(documents, Zigzag(9, 3), rank=0) == plans[0] != plans[1]


def test_plan_is_a_value_with_conveniences() -> None:
    p = plan(Causal(), Zigzag(8, 2), rank=1)
    assert torch.equal(p.positions(), Zigzag(8, 2).positions(1))
    assert p.shard({"x": torch.arange(8)[None]})["x"].tolist() == [[2, 3, 4, 5]]
    assert plan(Causal(), Zigzag(8, 1)).unshard(torch.arange(8.0)[None], None)[0, 3] == 3
    assert repr(p) == (
        "Plan(Causal(bottom_right=False) on Zigzag(length=8, world_size=2), direct, rank 1 of 2: "
        "2 steps, 18 pairs, 4 rows sent)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.rank = 0  # type: ignore[misc]
    assert int(p.handle[1]) == p.digest


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: plan(Causal()), "expected layout, or q_layout and k_layout"),
    (lambda: plan(Causal(), Zigzag(8, 2), k_layout=Zigzag(8, 2), rank=0), "expected layout, or q"),
    (lambda: plan(Causal(), q_layout=Zigzag(8, 2), rank=0), "expected a Layout as k_layout"),
    (lambda: plan(torch.ones(8, 8), Zigzag(8, 2), rank=0), "plan: expected a Mask"),  # type: ignore[arg-type]
    (lambda: plan(Causal(), Zigzag(8, 2)), "expected rank or group"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=2), r"expected a rank in \[0, 2\), got 2"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, generator="tree"), "generator of .*got 'tree'"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, resident=0), "resident"),
    (lambda: plan(Causal(), Zigzag(8, 2), rank=0, traveller="v"), "a traveller of .*got \"?'v'"),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, memory_bytes=1e9),
        "both shapes and machine",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, shapes=Shapes(2, 2, 16), traveller="q"),
        'expected shapes without a machine only with traveller="auto", got q',
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, traveller="q", generator="chain"),
        'expected traveller "kv" with chain',
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, resident=2, generator="chain"),
        "expected resident == 1 with chain, got 2",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, resident=2, ranks_per_node=2),
        "expected resident == 1 with double, got 2",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 6), rank=0, ranks_per_node=4),
        r"expected ranks_per_node of \[2, 3, 6\] with double, got 4",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 6), rank=0, generator="double"),
        r"expected ranks_per_node of \[2, 3, 6\] with double, got None",
    ),
    (
        lambda: plan(Causal(), Zigzag(8, 2), rank=0, generator="chain", ranks_per_node=2),
        "expected no ranks_per_node with chain, got 2",
    ),
    (
        lambda: plan(Full(), q_layout=Zigzag(8, 2), k_layout=Zigzag(8, 4), rank=0),
        r"layouts of one world size, got \(2, 4\)",
    ),
    (lambda: plan(Documents([0, 7]), Zigzag(8, 2), rank=0), "end at q_len = 8, got 7"),
    (lambda: plan(Full(), Contiguous(1 << 32, 2), rank=0), r"shards below 2\*\*31 rows"),
    (lambda: plan(Causal(), Contiguous(8, 2), rank=0).intervals(1), r"an origin of \[0\], got 1"),
]


@pytest.mark.parametrize("bad,message", BAD, ids=[message for _, message in BAD])
def test_refusals(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("make", LAYOUTS)
def test_planning_a_million_tokens_is_quick(
    make: Callable[[int, int], Layout], generator: str
) -> None:
    """10,000 documents on 64 ranks: about 0.2 s at worst, on one core that is otherwise idle."""
    length = 1 << 20
    cuts = sorted(random.Random(0).sample(range(1, length), 9999))
    mask, layout = Causal() & Documents([0, *cuts, length]), make(length, 64)
    start_s = time.process_time()
    p = plan(mask, layout, rank=17, **schedules(generator, 64)[-1])
    assert time.process_time() - start_s < 0.8
    assert sum(p.flops) > 0


def test_planning_does_not_depend_on_the_length() -> None:
    """64 billion tokens: nothing of the length's size is ever made."""
    mask = Causal() & (FirstTokens(4) | Window(4095, 0))
    for make in LAYOUTS:
        start_s = time.process_time()
        assert plan(mask, make(1 << 36, 64), rank=5).steps
        assert time.process_time() - start_s < 0.2


def test_examples() -> None:
    names = {"Causal": Causal, "Zigzag": Zigzag}
    assert doctest.testmod(plan_module, extraglobs=names).failed == 0
