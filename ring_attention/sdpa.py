# SPDX-License-Identifier: BSD-3-Clause
"""The spelling people know: torch's scaled_dot_product_attention, over a ring."""

from typing import Any

from torch import Tensor

from .function import attention
from .layout import Layout
from .mask import Causal, Full
from .rank_plan import Plan


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    group: Any = None,
    layout: Layout | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, its arguments and defaults, over a ring.

    As in torch nothing is masked by default, and is_causal aligns query 0 with key 0 (top-left)
    when the lengths differ. What torch has and this has not is refused, never ignored. For
    every other mask, unequal layouts, softcap, sinks or lse, call `ring_attention.attention`.

    Args:
        query: [B, H, Sq, D], this rank's shard.
        key, value: [B, G, Sk, D], [B, G, Sk, Dv]; G == H unless enable_gqa.
        attn_mask: must be None.
        dropout_p: must be 0.
        is_causal: query i sees keys 0..i, in global positions.
        scale: None: 1 / sqrt(D).
        enable_gqa: allow G to be a divisor of H.
        group, layout, plan: as in `attention`.

    Returns:
        [B, H, Sq, Dv] in query's dtype.

    Raises:
        NotImplementedError: attn_mask or dropout_p.
        ValueError: shapes that do not fit.

    Example:
        >>> y = scaled_dot_product_attention(q, k, v, is_causal=True, group=group, layout=layout)
    """
    name = "ring_attention.scaled_dot_product_attention"
    if attn_mask is not None:
        raise NotImplementedError(
            f"{name}: expected attn_mask=None, got a {type(attn_mask).__name__}; a dense mask "
            "would need N x N memory. Use is_causal, or ring_attention.attention(mask=...) with "
            "Window, Documents, PrefixLM, KeyLength, ... or a combination (a & b, a | b)"
        )
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{name}: expected dropout_p == 0.0, got {dropout_p}; attention dropout is not "
            "supported: drop out the layer's output instead"
        )
    for argument, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected {argument} of shape [batch, heads, length, head_dim], got "
                f"{list(x.shape)}; add the missing dimension with unsqueeze"
            )
    if not enable_gqa and not query.shape[1] == key.shape[1] == value.shape[1]:
        raise ValueError(
            f"{name}: expected equal numbers of heads, got {query.shape[1]}, {key.shape[1]} and "
            f"{value.shape[1]} in query, key and value; pass enable_gqa=True to share key heads"
        )
    mask = Causal() if is_causal else Full()
    out: Tensor = attention(
        query, key, value, mask=mask, group=group, layout=layout, plan=plan, scale=scale
    )
    return out
