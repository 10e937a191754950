# SPDX-License-Identifier: BSD-3-Clause
"""Rotary position embedding at any positions."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates pairs of x's components by angles that grow with the position.

    Component i is paired with i + D/2 and turned by `position * theta ** (-2i / D)`, the
    convention of GPT-NeoX, Llama and Hugging Face. After "RoFormer" (Su et al., 2021).

    Args:
        x: [B, H, S, D], D even.
        positions: [S] int64, *global* positions: those of a shard are `layout.positions(rank)`,
            which for a zigzag or striped shard are not a range.
        theta: the base, such as 10000.0.

    Returns:
        As x, in its dtype; computed in at least fp32.

    Example:
        >>> q = rotate(q, layout.positions(rank), theta=10000.0)
    """
    return turned(x, *turns(positions.to(x.device), x.shape[-1], theta, x.dtype))


def turns(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D/2] of the angles, for tensors of `dtype` on the positions' device."""
    half = head_dim // 2
    # Angles in fp64: at position 10^6 an fp32 angle is off by up to 0.06.
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angle = positions.to(torch.float64)[:, None] * theta**-exponent
    wide = torch.promote_types(dtype, torch.float32)
    return torch.cos(angle).to(wide), torch.sin(angle).to(wide)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, rotated by what `turns` returned."""
    out: Tensor = _Rotation.apply(x, cos, sin)
    return out


class _Rotation(torch.autograd.Function):
    """A function of its own because memory traffic is all it costs: four passes, not ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dout, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    out = torch.empty_like(wide)
    (a, b), (out_a, out_b) = wide.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out.to(x.dtype)
