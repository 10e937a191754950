# SPDX-License-Identifier: BSD-3-Clause
"""torch.autocast around autograd functions of our own."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that autocast asks for here; unchanged outside of autocast.

    Casting before an autograd.Function, and not inside, keeps forward and backward in one dtype,
    wherever backward is called. fp64 stays, as in autocast itself.
    """
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
