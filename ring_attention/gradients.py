# SPDX-License-Identifier: BSD-3-Clause
"""Parameter gradients of a model whose sequence is sharded."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checks import state_dtype
from .groups import all_reduce_, size_of

_BUCKET_BYTES = 32 << 20


@torch.no_grad()
def sum_gradients(parameters: nn.Module | Iterable[Tensor], group: Any) -> None:
    """Sums the parameters' gradients over the ring, in place: every rank then holds them whole.

    Each rank's backward sees its own tokens only, so what it finds for a shared parameter (weights,
    biases, norms, sinks) is one term of a sum over the shards. Gradients of *activations* are
    whole already. With a loss such as `linear_cross_entropy`, which divides by the token count of
    all ranks, the sum is exactly the unsharded gradient: nothing is to be averaged.

    With data parallelism around the ring, of D replicas and P ranks per ring:

    - DDP over the D replicas only (`DDP(model, process_group=replicas)`): DDP averages over the
      replicas, this sums over the ring; the two commute. Call it after backward.
    - DDP (or FSDP) over all D x P ranks averages over the ring too: multiply the loss by P before
      backward, and do not call this.
    - For replicas with unequal token counts the mean over replicas is not the mean over tokens:
      give `linear_cross_entropy` the group of all D x P ranks, multiply the loss by D x P, and let
      DDP over all ranks average.

    Sums of fp16 and bf16 gradients are taken in fp32 and rounded once.

    Args:
        parameters: a module or its parameters, the same on every rank.
        group: the ring, as in `attention`; None does nothing.

    Raises:
        TypeError: a sparse gradient, or one that is sharded itself (DTensor).

    Example:
        >>> loss.backward()
        >>> sum_gradients(model, group)
        >>> optimizer.step()
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    shared = [p for p in parameters if p.requires_grad]
    for p in shared:
        if p.grad is not None and (p.grad.layout != torch.strided or type(p.grad) is not Tensor):
            raise TypeError(
                "sum_gradients: expected dense gradients, got a "
                f"{type(p.grad).__name__} of layout {p.grad.layout} for a parameter of shape "
                f"{list(p.shape)}; let what shards the parameters reduce them (see above)"
            )
    if size_of(group) == 1 or not shared:
        return
    # A rank whose shard does not touch a parameter takes part with zeros; where no rank has a
    # gradient it stays None, so that an optimizer skips the parameter as it would unsharded.
    touched = torch.tensor(
        [p.grad is not None for p in shared], dtype=torch.float32, device=shared[0].device
    )
    touched = all_reduce_(touched, group)
    used = [p for p, count in zip(shared, touched.tolist(), strict=True) if count]
    for bucket in _buckets(used):
        wide = state_dtype(bucket[0].dtype)
        flat = torch.cat([_gradient(p).reshape(-1).to(wide) for p in bucket])
        all_reduce_(flat, group)
        for p, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            _gradient(p).copy_(total.view_as(p))


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that travel together: one device and dtype, a bounded size."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for p in parameters:
        kinds[p.device, p.dtype].append(p)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        nbytes = 0
        for p in kind:
            if bucket and nbytes + p.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, nbytes = [], 0
            bucket.append(p)
            nbytes += p.nbytes
        yield bucket
