# SPDX-License-Identifier: BSD-3-Clause
"""The blockwise feed-forward is the plain one, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ring_attention.feed_forward import BlockwiseFeedForward

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def plain(module: BlockwiseFeedForward, x: torch.Tensor) -> torch.Tensor:
    hidden = F.linear(x, module.up_weight, module.up_bias)
    act = ACTIVATIONS[module.activation]
    if module.gate_weight is None:
        hidden = act(hidden)
    else:
        hidden = hidden * act(F.linear(x, module.gate_weight, module.gate_bias))
    return F.linear(hidden, module.down_weight, module.down_bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matches_the_plain_feed_forward(activation: str, gated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = BlockwiseFeedForward(
        24, 40, activation=activation, gated=gated, bias=bias, chunk=7, dtype=torch.float64
    )
    x = torch.randn(2, 23, 24, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 23, 24, dtype=torch.float64)
    inputs = (x, *module.parameters())
    out, expected = module(x), plain(module, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout)
    )


@pytest.mark.parametrize("length", [0, 1, 8, 9])
def test_any_length(length: int) -> None:
    module = BlockwiseFeedForward(16, chunk=8, bias=True)
    x = torch.randn(1, length, 16, requires_grad=True)
    out = module(x)
    out.sum().backward()
    torch.testing.assert_close(out, plain(module, x))
    assert x.grad is not None and module.up_weight.grad is not None


def test_gradients_of_frozen_parts_are_not_computed() -> None:
    module = BlockwiseFeedForward(16, chunk=8)
    module.up_weight.requires_grad_(False)
    module(torch.randn(3, 16)).sum().backward()
    assert module.up_weight.grad is None and module.down_weight.grad is not None


def test_autocast_forward_and_backward_outside_of_it() -> None:
    torch.manual_seed(0)
    module = BlockwiseFeedForward(32, chunk=5, gated=True)
    x = torch.randn(1, 12, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        expected = plain(module, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert module.up_weight.grad is not None and module.up_weight.grad.dtype == torch.float32


def test_weight_gradients_in_bf16_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    exact = BlockwiseFeedForward(16, chunk=4096)
    module = BlockwiseFeedForward(16, chunk=2).bfloat16()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(4096, 16).bfloat16()
    exact(x.float()).sum().backward()
    module(x).sum().backward()
    wanted, got = exact.down_weight.grad, module.down_weight.grad
    assert wanted is not None and got is not None
    # 2048 additions in bf16 would be off by far more than the rounding of their terms.
    assert (got.float() - wanted).norm() <= 2**-8 * wanted.norm()


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_hidden_activations_exist_for_one_chunk_only() -> None:
    module = BlockwiseFeedForward(16, 256, chunk=32)
    x = torch.randn(1, 1024, 16, requires_grad=True)
    saved: list[int] = []
    with saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        out = module(x)
    assert sum(saved) == sum(t.numel() for t in (x, module.up_weight, module.down_weight))
    with LargestTensor() as largest:
        torch.autograd.backward(out, torch.ones_like(out))
        module(x)
    assert largest.elements == x.numel()  # and not 1024 * 256


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"expected ff_dim >= 1, got 0"):
        BlockwiseFeedForward(16, 0)
    with pytest.raises(ValueError, match=r"expected chunk >= 1, got -1"):
        BlockwiseFeedForward(16, chunk=-1)
    with pytest.raises(ValueError, match=r"expected activation in .*'gelu'.*got 'tanh'"):
        BlockwiseFeedForward(16, activation="tanh")
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 16\], got \[2, 8\]"):
        BlockwiseFeedForward(16)(torch.randn(2, 8))
