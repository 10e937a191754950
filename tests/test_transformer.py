# SPDX-License-Identifier: BSD-3-Clause
"""A block on a shard is its part of the block on the whole sequence."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention.gradients import sum_gradients
from ring_attention.layout import Zigzag
from ring_attention.transformer import RingTransformerBlock
from ring_attention.virtual import run_virtual

E = 48
LENGTH = 29  # divides by nothing


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_block_sharded_is_unsharded(world_size: int) -> None:
    torch.manual_seed(0)
    x, dout = torch.randn(2, 1, LENGTH, E, dtype=torch.float64)
    whole = RingTransformerBlock(E, 3, gated=True, chunk=4, rope=100.0, dtype=torch.float64)
    out = whole(x.requires_grad_())
    dx, *gradients = torch.autograd.grad(out, [x, *whole.parameters()], dout)
    layout = Zigzag(LENGTH, world_size)

    def run(group: Any) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        block = copy.deepcopy(whole)
        block.attention.group = group
        shard = layout.shard(x.detach(), group).clone().requires_grad_()
        got = block(shard, layout)
        got.backward(layout.shard(dout, group))
        sum_gradients(block, group)
        return got.detach(), shard.grad, [p.grad for p in block.parameters()]

    for rank, (got, got_dx, got_gradients) in enumerate(run_virtual(world_size, run)):
        torch.testing.assert_close(got, layout.shard(out.detach(), rank))
        torch.testing.assert_close(got_dx, layout.shard(dx, rank))
        torch.testing.assert_close(got_gradients, gradients)


def test_autocast() -> None:
    torch.manual_seed(0)
    block = RingTransformerBlock(E, 3, rope=100.0, qk_norm=True, sinks=True)
    x = torch.randn(1, LENGTH, E)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.sum().backward()
    assert block.attention.sinks.grad is not None
    torch.testing.assert_close(out, block(x), rtol=0.1, atol=0.1)
