# SPDX-License-Identifier: BSD-3-Clause
"""Rotary positions are those of the whole sequence, however it is sharded."""

import pytest
import torch

from ring_attention.layout import Contiguous, Striped, Zigzag
from ring_attention.rope import rotate


@pytest.mark.parametrize("layout_type", [Contiguous, Zigzag, Striped])
def test_a_shard_rotates_by_its_global_positions(layout_type: type[Zigzag]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 23, 16)
    whole = rotate(x, torch.arange(23), 100.0)
    layout = layout_type(23, 4)
    for rank in range(4):
        shard = rotate(layout.shard(x, rank, dim=2), layout.positions(rank), 100.0)
        torch.testing.assert_close(shard, layout.shard(whole, rank, dim=2))


def test_the_convention_of_hugging_face() -> None:
    torch.manual_seed(0)
    x, theta = torch.randn(1, 2, 7, 16), 100.0
    angle = torch.arange(7.0)[:, None] / theta ** (torch.arange(0, 16, 2) / 16)
    angle = torch.cat([angle, angle], -1)
    turned = torch.cat([-x[..., 8:], x[..., :8]], -1)  # rotate_half
    expected = x * angle.cos() + turned * angle.sin()
    torch.testing.assert_close(rotate(x, torch.arange(7), theta), expected)


def test_gradient() -> None:
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 3, 4, 900, 1001])
    assert torch.autograd.gradcheck(lambda x: rotate(x, positions, 100.0), x)


def test_rotation_is_relative_at_any_position() -> None:
    """Positions far beyond fp32's reach still differ by what they differ."""
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    score = [
        (rotate(q, torch.tensor([n + 5]), 1e4) * rotate(k, torch.tensor([n]), 1e4)).sum()
        for n in (0, 1000, 10_000_019)
    ]
    torch.testing.assert_close(score[1:], [score[0]] * 2, rtol=1e-5, atol=1e-5)
    assert rotate(q.bfloat16(), torch.tensor([3]), 1e4).dtype == torch.bfloat16
