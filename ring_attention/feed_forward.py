# SPDX-License-Identifier: BSD-3-Clause
"""The blockwise feed-forward: memory for one chunk of hidden activations, not for all of them.

Once attention needs no N x N matrix, the feed-forward's hidden activations are what fills the
memory. It works on each token alone, so it can run on a chunk of the sequence at a time, forward
and, recomputing the hidden activations, backward.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import autocast
from .checks import state_dtype

_aten = torch.ops.aten
# name -> (function, its backward: (gradient, input) -> gradient)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, lambda grad, x: _aten.gelu_backward(grad, x)),
    "relu": (F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "silu": (F.silu, lambda grad, x: _aten.silu_backward(grad, x)),
}


class BlockwiseFeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)), a chunk of tokens at a time.

    Value and gradients are those of the plain feed-forward; the weights' gradients are summed over
    the chunks in fp32. Between forward and backward only the input is kept. Follows section 3 of
    "Ring Attention with Blockwise Transformers" (Liu et al., 2023) and "Blockwise Parallel
    Transformer" (Liu and Abbeel, 2023).

    Args:
        embed_dim: E, size of a token's vector.
        ff_dim: F, size of its hidden activations; None: 4 E.
        activation: "gelu", "relu" or "silu".
        gated: a third matrix, whose activated product scales the hidden ones ("silu": SwiGLU).
        bias: with biases.
        chunk: tokens per chunk; chunk * F hidden activations exist at a time.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument out of range, or an input whose last dimension is not E.

    Example:
        >>> feed_forward = BlockwiseFeedForward(256, chunk=1024)
        >>> y = feed_forward(torch.randn(1, 100_000, 256))  # [1, 100000, 256]
    """

    def __init__(
        self,
        embed_dim: int,
        ff_dim: int | None = None,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        chunk: int = 2048,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ff_dim = 4 * embed_dim if ff_dim is None else ff_dim
        for name, value in (("embed_dim", embed_dim), ("ff_dim", ff_dim), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"BlockwiseFeedForward: expected {name} >= 1, got {value}")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"BlockwiseFeedForward: expected activation in {sorted(_ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.embed_dim = embed_dim
        self.activation = activation
        self.chunk = chunk

        # Plain parameters, not nn.Linear: what replaces or hooks a Linear would be passed by.
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.up_weight = parameter(ff_dim, embed_dim)
        self.gate_weight = parameter(ff_dim, embed_dim) if gated else None
        self.down_weight = parameter(embed_dim, ff_dim)
        self.up_bias = parameter(ff_dim) if bias else None
        self.gate_bias = parameter(ff_dim) if bias and gated else None
        self.down_bias = parameter(embed_dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as nn.Linear does."""
        for part in ("up", "gate", "down"):
            weight, bias = getattr(self, f"{part}_weight"), getattr(self, f"{part}_bias")
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if bias is not None:
                bound = 1 / math.sqrt(weight.shape[1])
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., E] in the parameters' dtype; returns the same shape."""
        if x.dim() < 1 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"BlockwiseFeedForward: expected x of shape [..., {self.embed_dim}], "
                f"got {list(x.shape)}"
            )
        tensors = autocast(
            x.reshape(-1, self.embed_dim),
            self.up_weight,
            self.up_bias,
            self.gate_weight,
            self.gate_bias,
            self.down_weight,
            self.down_bias,
        )
        out: Tensor = _FeedForward.apply(self.activation, self.chunk, *tensors)
        return out.view(x.shape)

    def extra_repr(self) -> str:
        ff_dim = self.up_weight.shape[0]
        gated = ", gated" if self.gate_weight is not None else ""
        return f"{self.embed_dim}, {ff_dim}, {self.activation}{gated}, chunk={self.chunk}"


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        chunk: int,
        x: Tensor,  # [tokens, E]
        up: Tensor,  # [F, E]
        up_bias: Tensor | None,
        gate: Tensor | None,  # [F, E]
        gate_bias: Tensor | None,
        down: Tensor,  # [E, F]
        down_bias: Tensor | None,
    ) -> Tensor:
        ctx.activation, ctx.chunk = activation, chunk
        ctx.save_for_backward(x, up, up_bias, gate, gate_bias, down, down_bias)
        act, _ = _ACTIVATIONS[activation]
        out = torch.empty_like(x)
        for rows in _chunks(x.shape[0], chunk):
            hidden = F.linear(x[rows], up, up_bias)
            if gate is None:
                hidden = act(hidden)
            else:
                hidden = hidden * act(F.linear(x[rows], gate, gate_bias))
            out[rows] = F.linear(hidden, down, down_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, up, up_bias, gate, gate_bias, down, _ = ctx.saved_tensors
        act, act_backward = _ACTIVATIONS[ctx.activation]
        wanted = ctx.needs_input_grad[2:]
        dx = torch.empty_like(x) if wanted[0] else None
        sums = [
            torch.zeros_like(p, dtype=state_dtype(p.dtype)) if want else None
            for p, want in zip(ctx.saved_tensors[1:], wanted[1:], strict=True)
        ]
        d_up, d_up_bias, d_gate, d_gate_bias, d_down, d_down_bias = sums
        for rows in _chunks(x.shape[0], ctx.chunk):
            # Recompute the hidden activations as in forward ...
            up_out = F.linear(x[rows], up, up_bias)
            gate_out = up_out if gate is None else F.linear(x[rows], gate, gate_bias)
            activated = act(gate_out)
            hidden = activated if gate is None else activated * up_out
            # ... and go back through them.
            _add_linear(d_down, d_down_bias, dout[rows], hidden)
            d_hidden = dout[rows] @ down
            if gate is None:
                d_up_out = act_backward(d_hidden, up_out)
                d_x = d_up_out @ up
            else:
                d_up_out = d_hidden * activated
                d_gate_out = act_backward(d_hidden * up_out, gate_out)
                _add_linear(d_gate, d_gate_bias, d_gate_out, x[rows])
                d_x = d_up_out @ up + d_gate_out @ gate
            _add_linear(d_up, d_up_bias, d_up_out, x[rows])
            if dx is not None:
                dx[rows] = d_x
        # Rounded once.
        return (None, None, dx, *(None if s is None else s.to(x.dtype) for s in sums))


def _add_linear(d_weight: Tensor | None, d_bias: Tensor | None, d_out: Tensor, x: Tensor) -> None:
    """Adds the gradients of out = x weight^T + bias."""
    if d_weight is not None:
        if d_weight.dtype == x.dtype:
            d_weight.addmm_(d_out.t(), x)
        else:
            d_weight += d_out.t() @ x
    if d_bias is not None:
        d_bias += d_out.sum(0, dtype=d_bias.dtype)
