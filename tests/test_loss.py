# SPDX-License-Identifier: BSD-3-Clause
"""The sharded loss is that of the unsharded batch, in value and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ring_attention.gradients import sum_gradients
from ring_attention.layout import Contiguous, Zigzag
from ring_attention.loss import linear_cross_entropy, shift_labels
from ring_attention.virtual import run_virtual

E, V = 12, 37


def problem(length: int, valid: Callable[[Tensor], Tensor], batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(batch, length, E, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, E, dtype=torch.float64, generator=generator)
    bias = torch.randn(V, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, V, (batch, length), generator=generator)
    return hidden, weight, bias, labels.where(valid(torch.arange(length)), -100)


def unsharded(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def rank(group: Any, layout: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
    hidden = layout.shard(hidden, group).clone().requires_grad_()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    labels = layout.shard(labels, group)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, group=group, chunk=5)
    loss.backward()
    sum_gradients([weight, bias], group)
    return loss.detach(), hidden.grad, weight.grad, bias.grad


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout_type", [Contiguous, Zigzag])
@pytest.mark.parametrize(
    ("length", "valid"),
    [
        pytest.param(23, lambda i: i >= 0, id="all"),
        pytest.param(24, lambda i: i < 7, id="some ranks have none"),
        pytest.param(31, lambda i: i % 3 == 1, id="unequal counts"),
        pytest.param(2, lambda i: i < 1, id="empty shards"),
    ],
)
def test_value_and_gradients_of_the_unsharded_batch(
    world_size: int, layout_type: Any, length: int, valid: Callable[[Tensor], Tensor]
) -> None:
    tensors = problem(length, valid)
    expected, d_hidden, d_weight, d_bias = unsharded(*tensors)
    layout = layout_type(length, world_size)
    for r, got in enumerate(run_virtual(world_size, rank, layout, *tensors)):
        torch.testing.assert_close(got[0], expected)
        torch.testing.assert_close(got[1], layout.shard(d_hidden, r))
        torch.testing.assert_close(got[2:], (d_weight, d_bias))


@pytest.mark.parametrize("length", [0, 9])
def test_no_valid_token_anywhere_is_as_in_torch(length: int) -> None:
    tensors = problem(length, lambda i: i < 0)
    layout = Contiguous(length, 2)
    for loss, *gradients in run_virtual(2, rank, layout, *tensors):
        assert loss.isnan()
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_a_nan_at_an_ignored_token_stays_there() -> None:
    hidden, weight, bias, labels = problem(16, lambda i: i != 5)
    hidden[:, 5] = float("nan")
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=4)
    d_hidden, _, d_bias = torch.autograd.grad(loss, inputs)
    assert loss.isfinite() and d_bias.isfinite().all()
    assert d_hidden[:, torch.arange(16) != 5].isfinite().all()


def test_upstream_factor_scales_the_gradient() -> None:
    hidden, weight, _, labels = problem(8, lambda i: i >= 0)
    weight.requires_grad_()
    (one,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)
    (three,) = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, labels), weight)
    torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_accumulate_in_fp32(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = problem(600, lambda i: i >= 0)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    expected, *gradients = unsharded(hidden.double(), weight.double(), bias.double(), labels)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk=3)
    assert loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=4 * eps, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), gradients, strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= 4 * eps * wanted.norm()


def test_autocast() -> None:
    hidden, weight, _, labels = problem(20, lambda i: i >= 0)
    hidden, weight = hidden.float(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    exact = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_no_logits_are_kept() -> None:
    tokens, vocabulary = 256, 4096
    hidden = torch.randn(1, tokens, E, requires_grad=True)
    weight = torch.randn(vocabulary, E, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    saved: list[int] = []
    with saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert sum(saved) <= hidden.numel() + weight.numel() + 2 * tokens
    loss.backward()


def test_wrong_labels_on_one_rank_raise_on_every_rank() -> None:
    messages: list[str] = []

    def run(group: Any) -> None:
        labels = torch.zeros(1, 4, dtype=torch.int64)
        if group.rank == 1:
            labels[0, 2] = V
        with pytest.raises(ValueError, match=rf"expected labels in \[0, {V}\)") as error:
            linear_cross_entropy(torch.zeros(1, 4, E), torch.zeros(V, E), labels, group=group)
        messages.append(str(error.value))

    run_virtual(3, run)
    assert len(messages) == 3 and sum(f"the first here is {V}" in m for m in messages) == 1


def test_refuses() -> None:
    hidden, weight, bias, labels = problem(8, lambda i: i >= 0)
    with pytest.raises(ValueError, match=r"weight \[V, E\], got \[2, 8, 12\] and \[12, 37\]"):
        linear_cross_entropy(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"labels of shape \[2, 8\].*shard labels as the tokens"):
        linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(TypeError, match=r"torch\.int64, got torch\.int32"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(TypeError, match=r"weight\.dtype == hidden\.dtype"):
        linear_cross_entropy(hidden, weight.float(), labels)
    with pytest.raises(ValueError, match=r"bias of shape \[37\], got \[36\]"):
        linear_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match=r"chunk >= 1, got 0"):
        linear_cross_entropy(hidden, weight, labels, chunk=0)


def test_shift_labels() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert shift_labels(tokens).tolist() == [[2, 3, 4, 5, 6, -100]]
    assert shift_labels(tokens[0], dim=0, ignore_index=-1).tolist() == [2, 3, 4, 5, 6, -1]
    documents = shift_labels(tokens, cu_seqlens=[0, 2, 2, 5, 6])
    assert documents.tolist() == [[2, -100, 4, 5, -100, -100]]
    assert shift_labels(tokens[:, :0]).shape == (1, 0)
    assert shift_labels(tokens[:, :0], cu_seqlens=[0]).shape == (1, 0)
    for wrong in ([0, 5], [1, 6], [0, 4, 3, 6], []):
        with pytest.raises(ValueError, match=r"cu_seqlens to rise from 0 to tokens.shape\[1\] = 6"):
            shift_labels(tokens, cu_seqlens=wrong)
