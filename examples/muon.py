# SPDX-License-Identifier: BSD-3-Clause
"""The Muon optimizer for weight matrices: few steps of training go a long way with it."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised (Jordan et al., 2024), for 2-D parameters.

    torch.optim.Muon computes in bf16, which is slow on CPUs without bf16 instructions; this one
    stays in the parameters' dtype.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Moves each parameter by lr along a direction with singular values near one."""
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalised(p.grad.lerp(mean, group["momentum"]))  # Nesterov
                rows, columns = p.shape
                p.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalised(x: Tensor) -> Tensor:
    """About U V^T of x = U S V^T, by five Newton-Schulz iterations."""
    if x.shape[0] > x.shape[1]:
        return orthogonalised(x.t()).t()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.t()
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
