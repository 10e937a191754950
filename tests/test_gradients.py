# SPDX-License-Identifier: BSD-3-Clause
"""Partial parameter gradients become whole ones."""

from typing import Any

import pytest
import torch
from torch import nn

from ring_attention import gradients
from ring_attention.gradients import sum_gradients
from ring_attention.virtual import run_virtual


def test_sums_every_dtype_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_BUCKET_BYTES", 64)  # several buckets

    def run(group: Any) -> list[torch.Tensor | None]:
        dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32]
        parameters = [nn.Parameter(torch.zeros(3, 5, dtype=dtype)) for dtype in dtypes]
        for i, p in enumerate(parameters):
            p.grad = torch.full_like(p, 10.0 * i + group.rank + 1)
        sum_gradients(iter(parameters), group)
        return [p.grad for p in parameters]

    for got in run_virtual(3, run):
        for i, grad in enumerate(got):
            assert grad is not None
            torch.testing.assert_close(grad, torch.full_like(grad, 30.0 * i + 6))


def test_bf16_sums_round_once() -> None:
    def run(group: Any) -> float:
        p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        p.grad = torch.tensor([256.0 if group.rank == 0 else 0.5], dtype=torch.bfloat16)
        sum_gradients([p], group)
        return p.grad.item()

    assert set(run_virtual(5, run)) == {258.0}  # in bf16, 256 + 0.5 = 256


def test_a_rank_without_a_gradient_takes_part_and_none_stays_none() -> None:
    def run(group: Any) -> tuple[torch.Tensor | None, ...]:
        module = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
        module[2].weight.requires_grad_(False)
        if group.rank == 1:
            module[0].weight.grad = torch.ones(2, 2)
        sum_gradients(module, group)
        return tuple(layer.weight.grad for layer in module)

    for first, unused, frozen in run_virtual(2, run):
        assert first is not None and first.eq(1).all()
        assert unused is None and frozen is None


def test_without_a_group_nothing_happens() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = grad = torch.ones(2)
    sum_gradients([p], None)
    assert p.grad is grad and grad.eq(1).all()


def test_refuses_sparse_gradients() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"expected dense gradients.*sparse.*\[4, 2\]"):
        sum_gradients(embedding, None)
