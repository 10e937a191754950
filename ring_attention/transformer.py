# SPDX-License-Identifier: BSD-3-Clause
"""A transformer block whose every part works on a shard of the sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from .feed_forward import BlockwiseFeedForward
from .layout import Layout
from .mask import Mask
from .module import RingAttention
from .rank_plan import Plan


class RingTransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), on a rank's shard of the sequence.

    Args:
        embed_dim, heads: as in `RingAttention`.
        ff_dim: size of the feed-forward's hidden activations; None: 4 E.
        activation, gated, chunk: as in `BlockwiseFeedForward`.
        bias, device, dtype: of both.
        attention: further arguments of `RingAttention` (kv_heads, rope, window, group, ...).

    Raises:
        ValueError: as `RingAttention` and `BlockwiseFeedForward`.

    Example:
        >>> block = RingTransformerBlock(512, 8, rope=10000.0, group=group)
        >>> y = block(layout.shard(x, group), layout=layout)  # [B, S of this rank, 512]
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        ff_dim: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        chunk: int = 2048,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.RMSNorm(embed_dim, eps=1e-6, **where)
        self.attention = RingAttention(embed_dim, heads, bias=bias, **attention, **where)
        self.feed_forward_norm = nn.RMSNorm(embed_dim, eps=1e-6, **where)
        self.feed_forward = BlockwiseFeedForward(
            embed_dim,
            ff_dim,
            activation=activation,
            gated=gated,
            bias=bias,
            chunk=chunk,
            **where,
        )

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        *,
        plan: Plan | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """x: [B, S, E]; arguments and result as in `RingAttention.forward`."""
        x = x + self.attention(self.attention_norm(x), layout, plan=plan, mask=mask)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x
