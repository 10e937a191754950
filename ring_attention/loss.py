# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a sharded language model: that of the unsharded batch, without its logits."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast
from .checks import state_dtype
from .groups import all_reduce_


def shift_labels(
    tokens: Tensor,
    *,
    dim: int = 1,
    cu_seqlens: Sequence[int] | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Next-token labels of whole sequences: call it before sharding, then shard the labels.

    The successor of a shard's last token is on another rank, so labels shifted after sharding are
    wrong at every seam.

    Args:
        tokens: [B, S] (any shape), the unsharded sequences.
        dim: the sequence dimension.
        cu_seqlens: for packed documents, where they begin and end: [0, ..., S]. The last token of a
            document then has no successor.
        ignore_index: the label of a token without successor.

    Returns:
        Labels of tokens' shape: `labels[i] = tokens[i + 1]`.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to S.

    Example:
        >>> batch = {"tokens": tokens, "labels": shift_labels(tokens)}
        >>> shard = layout.shard(batch, group)
    """
    length = tokens.shape[dim]
    labels = torch.full_like(tokens, ignore_index)
    if length > 0:
        labels.narrow(dim, 0, length - 1).copy_(tokens.narrow(dim, 1, length - 1))
    if cu_seqlens is not None:
        ends = [int(end) for end in cu_seqlens]
        rising = all(a <= b for a, b in itertools.pairwise(ends))
        if not ends or ends[0] != 0 or ends[-1] != length or not rising:
            raise ValueError(
                f"shift_labels: expected cu_seqlens to rise from 0 to tokens.shape[{dim}] = "
                f"{length}, got {ends[:3]}...{ends[-3:]}"
            )
        last = sorted({end - 1 for end in ends[1:] if end > 0})
        index = torch.tensor(last, dtype=torch.int64, device=tokens.device)
        labels.index_fill_(dim, index, ignore_index)
    return labels


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    group: Any = None,
    ignore_index: int = -100,
    chunk: int = 1024,
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T + bias` over the valid tokens of *all* ranks.

    Value and gradients are those of `cross_entropy(logits, labels)` on the unsharded batch,
    whatever the token counts per rank: the sum over all ranks divided by their common count. (A
    mean of the ranks' means would weigh a token by how few there are on its rank.) Logits exist
    for one chunk of tokens at a time and are recomputed in backward. Collective over `group`.

    Every rank returns the same value; its backward gives the gradient of `hidden` and this rank's
    part of the gradient of `weight` and `bias`: see `sum_gradients`.

    Args:
        hidden: [..., E], the last hidden states of this rank's tokens.
        weight: [V, E], the vocabulary projection.
        labels: [...] int64, in [0, V) or ignore_index; from `shift_labels`, sharded as the tokens.
        bias: [V] or None.
        group: the ring (as in `attention`), or a group of all ranks that share the batch.
        ignore_index: tokens with this label do not count.
        chunk: tokens per chunk; chunk * V logits exist at a time.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs). As in torch, NaN (and zero gradients) when no token
        of any rank is valid.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit. A label outside of [0, V), on any
            rank, raises on every rank.

    Example:
        >>> labels = layout.shard(shift_labels(tokens), group)
        >>> loss = linear_cross_entropy(hidden, embedding.weight, labels, group=group)
        >>> loss.backward()
        >>> sum_gradients(model, group)
    """
    _check(hidden, weight, labels, bias, chunk)
    hidden_, weight_, bias_ = autocast(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_, weight_, bias_, labels.reshape(-1), group, ignore_index, chunk
    )
    return loss


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk: int) -> None:
    name = "linear_cross_entropy"
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: expected hidden [..., E] and weight [V, E], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: expected labels of shape {list(hidden.shape[:-1])} (hidden without its last "
            f"dimension), got {list(labels.shape)}; shard labels as the tokens"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected labels of dtype torch.int64, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: expected bias of shape {list(weight.shape[:1])}, got {list(bias.shape)}"
        )
    for other, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected {other}.dtype == hidden.dtype, got {value.dtype} and "
                f"{hidden.dtype}; cast one, or use torch.autocast"
            )
    if chunk < 1:
        raise ValueError(f"{name}: expected chunk >= 1, got {chunk}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [tokens, E]
        weight: Tensor,  # [V, E]
        bias: Tensor | None,
        labels: Tensor,  # [tokens]
        group: Any,
        ignore_index: int,
        chunk: int,
    ) -> Tensor:
        valid = labels != ignore_index
        wrong = labels[valid & ((labels < 0) | (labels >= weight.shape[0]))]
        wide = state_dtype(hidden.dtype)
        lse = hidden.new_empty(labels.shape, dtype=wide)
        # fp64 holds the count of any number of tokens. A rank with wrong labels says so in the
        # collective it would otherwise leave the others waiting in.
        total = hidden.new_zeros(3, dtype=torch.float64)  # sum, valid tokens, wrong labels
        total[1], total[2] = valid.sum(), wrong.numel()
        for begin in range(0, 0 if wrong.numel() else labels.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = _logits(hidden[rows], weight, bias)
            lse[rows] = logits.logsumexp(-1)
            target = labels[rows].where(valid[rows], 0)
            loss = lse[rows] - logits.gather(-1, target[:, None])[:, 0]
            total[0] += loss.where(valid[rows], 0).sum(dtype=torch.float64)
        all_reduce_(total, group)
        if total[2] > 0:
            first = f"; the first here is {int(wrong[0])}" if wrong.numel() else ", none here"
            raise ValueError(
                f"linear_cross_entropy: expected labels in [0, {weight.shape[0]}) or ignore_index "
                f"{ignore_index}, got {int(total[2])} others over all ranks{first}"
            )
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.count, ctx.ignore_index, ctx.chunk = total[1], ignore_index, chunk
        return (total[0] / total[1]).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if wants_bias else None
        scale = (dloss / ctx.count.clamp(min=1)).to(lse.dtype)
        for begin in range(0, labels.shape[0], ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            valid = (labels[rows] != ctx.ignore_index)[:, None]
            # d loss / d logits = softmax(logits) - one-hot(label)
            d_logits = _logits(hidden[rows], weight, bias).sub_(lse[rows, None]).exp_()
            target = labels[rows, None].where(valid, 0)
            d_logits.scatter_add_(-1, target, torch.full_like(lse[rows, None], -1))
            d_logits = (d_logits * scale).where(valid, 0)  # where: an ignored row may hold NaN
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[rows]
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(hidden.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A chunk's logits in the accumulation dtype, a tensor of their own."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.to(state_dtype(logits.dtype))
