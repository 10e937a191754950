# SPDX-License-Identifier: BSD-3-Clause
"""The proof that a ring computes what one process computes."""

import copy
import sys

import torch
from torch import Tensor

from model import ByteModel


def prove(model: ByteModel, tokens: Tensor) -> str:
    """Holds the ring's loss and gradients against one process, both against one in fp64.

    Args:
        model: as it will be trained; it is not changed.
        tokens: [B, S] whole sequences, the same on every rank.

    Returns:
        The numbers, as text. Exits where a bound is not met.
    """
    ring_loss, ring = _loss_and_gradient(model, model.group, torch.float32, tokens)
    one_loss, one = _loss_and_gradient(model, None, torch.float32, tokens)
    exact_loss, exact = _loss_and_gradient(model, None, torch.float64, tokens)
    ring_error, one_error = (float((x - exact).norm() / exact.norm()) for x in (ring, one))
    numbers = (
        f"  loss            {ring_loss:.7f}, one process {one_loss:.7f}, fp64 {exact_loss:.7f}\n"
        f"  gradient error  {ring_error:.2e}, one process {one_error:.2e}, against fp64\n"
    )
    if not (abs(ring_loss - exact_loss) <= 1e-6 * exact_loss and ring_error <= 2 * one_error):
        sys.exit(f"The ring does not compute what one process computes:\n{numbers}")
    return f"{numbers}  bounds met: loss to 1e-6, gradient error <= 2 x that of one process"


def _loss_and_gradient(
    model: ByteModel, group: object, dtype: torch.dtype, tokens: Tensor
) -> tuple[float, Tensor]:
    twin = copy.deepcopy(model).to(dtype)
    twin.group = group
    generator = torch.Generator().manual_seed(0)
    for p in twin.parameters():  # the blocks of a new model are the identity: shake them
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    loss = twin.backward(tokens)
    return loss, torch.cat([p.grad.flatten().double() for p in twin.parameters()])
