# SPDX-License-Identifier: BSD-3-Clause
"""Attention as a layer: projections, rotary positions and masks around the ring."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from .checks import state_dtype
from .function import attention
from .groups import rank_of, size_of
from .layout import Layout
from .mask import Causal, Mask, Window
from .rank_plan import Plan
from .rope import turned, turns


class RingAttention(nn.Module):
    """Multi-head self-attention over a sequence sharded across the ranks of a group.

    With `group=None` it is an ordinary attention layer; the same weights give the same numbers
    sharded, from the rank's own tokens. Parameter gradients are then partial: see `sum_gradients`.

    Args:
        embed_dim: E, size of a token's vector.
        heads: H query heads.
        kv_heads: G key and value heads, a divisor of H; None: H.
        head_dim: D; None: E / H.
        bias: all four projections have a bias.
        rope: base of the rotary embedding (such as 10000.0), applied at global positions; None: no
            rotary embedding.
        qk_norm: RMS norm over each head's query and key, before the rotation.
        mask: what a query sees where forward is not told otherwise; None: `Causal()`.
        window: (left, right) keys seen before and after the query, which is itself not counted
            (None: unbounded), on top of any mask.
        sinks: a learnable sink per head: a logit that takes part in the softmax without a value.
        softcap: c, bounds scores to c tanh(score / c); None: unbounded.
        invariant: the same bits of attention for every number of ranks, as in `plan`. The layer's
            projections are matrix products of a rank's own rows: their bits are up to torch.
        group: the ring: a ProcessGroup, a DeviceMesh (its "cp" dimension), a virtual group or
            None. A copy of the module shares it.
        device, dtype: of the parameters.

    Raises:
        ValueError: dimensions that do not divide, or a base or window out of range.

    Example:
        >>> layer = RingAttention(512, 8, kv_heads=2, rope=10000.0, group=group)
        >>> layout = Zigzag(length, group.size())
        >>> y = layer(layout.shard(x, group), layout=layout)  # [B, S of this rank, 512]
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        rope: float | None = None,
        qk_norm: bool = False,
        mask: Mask | None = None,
        window: tuple[int | None, int | None] | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        invariant: bool | int = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check_sizes(embed_dim, heads, kv_heads, head_dim)
        head_dim = embed_dim // heads if head_dim is None else head_dim
        if rope is not None and (head_dim % 2 or not rope > 0):
            raise ValueError(
                "RingAttention: expected an even head_dim and a positive base for rope, "
                f"got head_dim {head_dim} and rope {rope}"
            )
        self.embed_dim, self.heads, self.kv_heads = embed_dim, heads, kv_heads
        self.head_dim, self.rope, self.softcap, self.group = head_dim, rope, softcap, group
        self.invariant = invariant
        self.mask = Causal() if mask is None else mask
        self.window = None if window is None else Window(*window)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, heads * head_dim, bias=bias, **where)
        self.k_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **where)
        self.v_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **where)
        self.out_proj = nn.Linear(heads * head_dim, embed_dim, bias=bias, **where)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, **where) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, **where) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(heads, **where)) if sinks else None

    def effective_mask(self, mask: Mask | None = None) -> Mask:
        """What a query sees given forward's `mask`: the mask to make a plan of for this layer."""
        mask = self.mask if mask is None else mask
        return mask if self.window is None else mask & self.window

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        *,
        plan: Plan | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: [B, S, E], the tokens of this rank.
            layout: where they are in the whole sequence; needed with a group, unless `plan` is
                given.
            plan: a plan made beforehand; instead of a layout, and of a mask. With a `window` it has
                to be a plan of `effective_mask(mask)`.
            mask: in place of the layer's own mask, in global positions.

        Returns:
            [B, S, E].

        Raises:
            ValueError: shapes, layout or plan that do not fit, before any communication.
        """
        if plan is not None and mask is None and self.window is None:
            mask = plan.mask
        mask = self.effective_mask(mask)
        held = self._layout(x, layout, plan, mask)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H or G, S, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normalised(q, self.q_norm), _normalised(k, self.k_norm)
        if self.rope is not None:
            by = turns(self._positions(x, held), self.head_dim, self.rope, q.dtype)
            q, k = turned(q, *by), turned(k, *by)
        sinks = None if self.sinks is None else self.sinks.to(state_dtype(q.dtype))
        out: Tensor = attention(
            q,
            k,
            v,
            mask=mask,
            group=self.group,
            layout=layout,
            plan=plan,
            softcap=self.softcap,
            sinks=sinks,
            invariant=self.invariant,
        )
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(-2))
        return y

    def _layout(
        self, x: Tensor, layout: Layout | None, plan: Plan | None, mask: Mask
    ) -> Layout | None:
        """The layout of x, once everything is known to fit; None: x is the whole sequence."""
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(
                f"RingAttention: expected x of shape [B, S, {self.embed_dim}], got {list(x.shape)}"
            )
        if plan is not None:
            if layout is not None:
                raise ValueError(
                    "RingAttention: expected layout or plan, got both; a plan has its own layout"
                )
            if plan.mask != mask:
                raise ValueError(
                    f"RingAttention: expected plan.mask == {mask}, got {plan.mask}; make the plan "
                    "of layer.effective_mask(mask)"
                )
            if plan.q_layout != plan.k_layout:
                raise ValueError(
                    "RingAttention: expected a plan whose queries and keys have one layout, got "
                    f"{plan.q_layout} and {plan.k_layout}; this layer is self-attention"
                )
            layout = plan.q_layout
        rank, size = rank_of(self.group), size_of(self.group)
        if layout is None:
            if size > 1:
                raise ValueError(
                    f"RingAttention: expected layout or plan with a group of {size} ranks, got "
                    "neither; pass the layout that made the shards, such as Zigzag(length, "
                    f"{size})"
                )
            return None
        if layout.world_size != size:
            raise ValueError(
                f"RingAttention: expected a layout for the {size} ranks of the group, got {layout}"
            )
        if layout.sizes[rank] != x.shape[1]:
            raise ValueError(
                f"RingAttention: expected x.shape[1] == {layout.sizes[rank]}, the share of rank "
                f"{rank} in {layout}, got {x.shape[1]}; shard x with layout.shard(x, group)"
            )
        return layout

    def _positions(self, x: Tensor, layout: Layout | None) -> Tensor:
        """Global positions of x's tokens, on its device."""
        if layout is None:
            return torch.arange(x.shape[1], device=x.device)
        return layout.positions_on(rank_of(self.group), x.device)

    @classmethod
    def from_multihead_attention(
        cls, source: nn.MultiheadAttention, *, mask: Mask, group: Any = None
    ) -> Self:
        """A layer with the weights (copied) of a `torch.nn.MultiheadAttention`.

        Args:
            source: a self-attention module.
            mask: what its `attn_mask` said (`nn.MultiheadAttention` sees everything by default:
                `Full()`; in a bool attn_mask of that module True means *not* seen).
            group: the ring.

        Raises:
            ValueError: a module with dropout, kdim, vdim, add_bias_kv, add_zero_attn, or
                batch_first=False.

        Example:
            >>> source = nn.MultiheadAttention(512, 8, batch_first=True)
            >>> layer = RingAttention.from_multihead_attention(source, mask=Causal())
        """
        refused = {
            "dropout == 0": source.dropout != 0,
            "no kdim or vdim": source.in_proj_weight is None,
            "add_bias_kv=False": source.bias_k is not None,
            "add_zero_attn=False": source.add_zero_attn,
            "batch_first=True (RingAttention takes [B, S, E])": not source.batch_first,
        }
        for expected, wrong in refused.items():
            if wrong:
                raise ValueError(f"from_multihead_attention: expected a module with {expected}")
        weight, bias = source.in_proj_weight, source.in_proj_bias
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        layer = cls(
            source.embed_dim,
            source.num_heads,
            bias=bias is not None,
            mask=mask,
            group=group,
            **where,
        )
        with torch.no_grad():
            for i, projection in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
                projection.weight.copy_(weight.chunk(3)[i])
                if bias is not None:
                    projection.bias.copy_(bias.chunk(3)[i])
            layer.out_proj.load_state_dict(source.out_proj.state_dict())
        layer.train(source.training)
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A communicator is shared by copies: it cannot be copied itself.
        memo[id(self.group)] = self.group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"rope={self.rope}, mask={self.effective_mask()}, ranks={size_of(self.group)}"
        )


def _check_sizes(embed_dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    sizes = {"embed_dim": embed_dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"RingAttention: expected {name} >= 1, got {value}")
    if head_dim is None and embed_dim % heads:
        raise ValueError(
            f"RingAttention: expected heads to divide embed_dim, got {heads} and {embed_dim}; or "
            "pass head_dim"
        )
    if heads % kv_heads:
        raise ValueError(
            f"RingAttention: expected kv_heads to divide heads, got {kv_heads} and {heads}"
        )


def _normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In the norm's own dtype, which under autocast is wider than x's."""
    y: Tensor = norm(x.to(norm.weight.dtype))
    return y.to(x.dtype)
