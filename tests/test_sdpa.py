# SPDX-License-Identifier: BSD-3-Clause
"""torch's spelling: same arguments, same numbers, and refusals instead of silence."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ring_attention.layout import Zigzag
from ring_attention.sdpa import scaled_dot_product_attention
from ring_attention.virtual import run_virtual


def qkv(q_len: int = 19, k_len: int = 19, kv_heads: int = 4) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(2, 4, q_len, 16),
        torch.randn(2, kv_heads, k_len, 16),
        torch.randn(2, kv_heads, k_len, 16),
    )


def test_torchs_arguments_and_defaults() -> None:
    torchs = {
        "query": inspect.Parameter.empty,
        "key": inspect.Parameter.empty,
        "value": inspect.Parameter.empty,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    ours = inspect.signature(scaled_dot_product_attention).parameters
    assert {name: p.default for name, p in list(ours.items())[:8]} == torchs
    assert list(ours)[:8] == list(torchs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(19, 19), (7, 19), (19, 7)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_as_torch(is_causal: bool, q_len: int, k_len: int, scale: float | None) -> None:
    inputs = [x.requires_grad_() for x in qkv(q_len, k_len)]
    arguments: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    out = scaled_dot_product_attention(*inputs, **arguments)
    expected = F.scaled_dot_product_attention(*inputs, **arguments)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_over_a_ring(is_causal: bool) -> None:
    q, k, v = qkv(kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    layout = Zigzag(19, 3)

    def run(group: Any) -> torch.Tensor:
        shards = [layout.shard(x, group, dim=2) for x in (q, k, v)]
        return scaled_dot_product_attention(
            *shards, is_causal=is_causal, enable_gqa=True, group=group, layout=layout
        )

    for rank, out in enumerate(run_virtual(3, run)):
        torch.testing.assert_close(out, layout.shard(expected, rank, dim=2))


def test_refuses_what_torch_has_and_this_has_not() -> None:
    q, k, v = qkv()
    mask = torch.ones(19, 19, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"attn_mask=None.*mask=\.\.\."):
        scaled_dot_product_attention(q, k, v, mask)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"dropout_p == 0\.0, got 0\.1"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"got 4, 2 and 2 .*enable_gqa=True"):
        scaled_dot_product_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"key of shape .* got \[4, 19, 16\].*unsqueeze"):
        scaled_dot_product_attention(q, k[0], v)
