# SPDX-License-Identifier: BSD-3-Clause
"""A language model over bytes whose sequences are shared by a ring."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from ring_attention import (
    Causal,
    RingAttention,
    RingTransformerBlock,
    Window,
    Zigzag,
    agree,
    linear_cross_entropy,
    plan,
    rank_of,
    shift_labels,
    sum_gradients,
)

# Half of the layers look back a little, half all the way. A windowed layer sends only the rows
# that its windows reach.
WINDOWS = [(511, 0), None, (511, 0), None]


@lru_cache
def _plans(layer: RingAttention, batch: int, layout: Zigzag) -> dict:
    """Plans for all windows, agreed on by the ranks: attention then posts without asking again."""
    group = layer.group
    rows = layout.sizes[rank_of(group)]
    q = torch.empty(batch, layer.heads, rows, layer.head_dim, device="meta")
    plans = {}
    for window in dict.fromkeys(WINDOWS):  # in the same order on all ranks
        mask = Causal() if window is None else Causal() & Window(*window)
        plans[mask] = plan(mask, layout, group=group)
        agree(plans[mask], group, q, q, q)
    return plans


class ByteModel(nn.Module):
    """A decoder-only transformer. With group=None it trains on whole sequences in this process."""

    def __init__(self, embed_dim: int, heads: int, group: object = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, embed_dim)
        self.blocks = nn.ModuleList(
            RingTransformerBlock(
                embed_dim, heads, rope=10_000.0, qk_norm=True, window=window, group=group
            )
            for window in WINDOWS
        )
        self.norm = nn.RMSNorm(embed_dim)
        self.head = nn.Parameter(torch.zeros(256, embed_dim))
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.attention.out_proj.weight)
            nn.init.zeros_(block.feed_forward.down_weight)

    @property
    def group(self) -> object:
        """The ring of all layers; None is this process alone."""
        return self.blocks[0].attention.group

    @group.setter
    def group(self, group: object) -> None:
        for block in self.blocks:
            block.attention.group = group

    def backward(self, tokens: Tensor) -> float:
        """Loss and gradients of whole sequences [B, S], of which this rank computes its share."""
        world_size = 1 if self.group is None else self.group.size()
        layout = Zigzag(tokens.shape[1], world_size)
        batch = {"tokens": tokens, "labels": shift_labels(tokens)}  # shifted first, then sharded
        batch = layout.shard(batch, self.group)
        plans = _plans(self.blocks[0].attention, len(tokens), layout)

        x = self.embedding(batch["tokens"])
        for block in self.blocks:
            x = block(x, plan=plans[block.attention.effective_mask()])
        # The mean over the tokens of all ranks; then each rank has its part of the gradients.
        loss = linear_cross_entropy(self.norm(x), self.head, batch["labels"], group=self.group)
        loss.backward()
        sum_gradients(self, self.group)
        return loss.item()
