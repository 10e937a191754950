# SPDX-License-Identifier: BSD-3-Clause
"""The layers against dense computations, whole and sharded."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ring_attention.gradients import sum_gradients
from ring_attention.layout import Contiguous, Striped, Zigzag
from ring_attention.mask import Causal, Full, Window
from ring_attention.module import RingAttention
from ring_attention.plan import plan
from ring_attention.virtual import run_virtual

E = 48
LENGTH = 29  # divides by nothing
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "gqa": {"kv_heads": 1, "head_dim": 24},
    "rope": {"rope": 100.0},
    "norm": {"qk_norm": True, "rope": 100.0},
    "window": {"window": (5, 0), "rope": 100.0},
    "sinks": {"sinks": True, "softcap": 2.0},
    "full": {"mask": Full()},
}


def build(options: dict[str, Any], group: Any = None) -> RingAttention:
    """The same weights for every group, none of them special."""
    module = RingAttention(E, 3, **options, group=group, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)  # virtual ranks share torch's own
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return module


def complex_rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """The rotation as multiplication by e^(i angle)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(angle * 0 + 1, angle)
    return torch.cat([turned.real, turned.imag], -1)


def dense(module: RingAttention, x: Tensor, visible: Tensor) -> Tensor:
    """The layer's mathematics with an N x N matrix."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)

    q, k, v = (heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    if module.q_norm is not None and module.k_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.rope is not None:
        positions = torch.arange(x.shape[1], dtype=torch.float64)
        q, k = (complex_rotate(y, positions, module.rope) for y in (q, k))
    k, v = (y.repeat_interleave(module.heads // module.kv_heads, 1) for y in (k, v))
    scores = q @ k.mT / module.head_dim**0.5
    if module.softcap is not None:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if module.sinks is not None:
        sink = module.sinks[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    out = scores.softmax(-1)[..., : x.shape[1]] @ v
    return module.out_proj(out.transpose(1, 2).flatten(-2))


def visible(options: dict[str, Any], length: int = LENGTH) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)
    if options.get("mask") == Full():
        return torch.ones(length, length, dtype=torch.bool)
    left = options.get("window", (length, 0))[0]
    return (j <= i) & (j >= i - left)


def whole_problem(options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """x, dout, and dense out, dx and parameter gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, E, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, LENGTH, E, dtype=torch.float64)
    module = build(options)
    out = dense(module, x, visible(options))
    dx, *gradients = torch.autograd.grad(out, [x, *module.parameters()], dout)
    return x.detach(), dout, out.detach(), dx, gradients


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unsharded_is_dense_attention(options: dict[str, Any]) -> None:
    x, dout, out, dx, gradients = whole_problem(options)
    module = build(options)
    x.requires_grad_()
    got = module(x)
    torch.testing.assert_close(got, out)
    got_dx, *got_gradients = torch.autograd.grad(got, [x, *module.parameters()], dout)
    torch.testing.assert_close(got_dx, dx)
    torch.testing.assert_close(got_gradients, gradients)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("planned", [False, True], ids=["layout", "plan"])
def test_sharded_is_unsharded(world_size: int, options: dict[str, Any], planned: bool) -> None:
    x, dout, out, dx, gradients = whole_problem(options)
    layout_type = (Contiguous, Zigzag, Striped)[world_size % 3]
    layout = layout_type(LENGTH, world_size)

    def run(group: Any) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        module = build(options, group)
        shard = layout.shard(x, group).clone().requires_grad_()
        if planned:
            mine = plan(module.effective_mask(), layout, rank=group.rank)
            got = module(shard, plan=mine)
        else:
            got = module(shard, layout)
        got.backward(layout.shard(dout, group))
        sum_gradients(module, group)
        return got.detach(), shard.grad, [p.grad for p in module.parameters()]

    for rank, (got, got_dx, got_gradients) in enumerate(run_virtual(world_size, run)):
        torch.testing.assert_close(got, layout.shard(out, rank))
        torch.testing.assert_close(got_dx, layout.shard(dx, rank))
        torch.testing.assert_close(got_gradients, gradients)


def test_more_ranks_than_tokens() -> None:
    x = torch.randn(1, 3, E, dtype=torch.float64)
    expected = build({"rope": 100.0})(x)
    layout = Zigzag(3, 4)
    outs = run_virtual(
        4, lambda group: build({"rope": 100.0}, group)(layout.shard(x, group), layout)
    )
    for rank, out in enumerate(outs):
        torch.testing.assert_close(out, layout.shard(expected, rank))


def test_masks_of_a_call_replace_the_layers_own_but_not_its_window() -> None:
    x = torch.randn(1, LENGTH, E, dtype=torch.float64)
    module = build({})
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(module(x, mask=Full()), dense(module, x, everything))
    windowed = build({"window": (5, 5)})
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    torch.testing.assert_close(windowed(x, mask=Full()), dense(windowed, x, (i - j).abs() <= 5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_converts_multihead_attention(bias: bool, causal: bool) -> None:
    torch.manual_seed(0)
    source = nn.MultiheadAttention(E, 3, bias=bias, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    x = torch.randn(2, LENGTH, E, dtype=torch.float64)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    expected, _ = source(x, x, x, attn_mask=hidden, need_weights=False)
    mask = Causal() if causal else Full()
    module = RingAttention.from_multihead_attention(source.eval(), mask=mask)
    assert not module.training
    torch.testing.assert_close(module(x), expected)
    module.q_proj.weight.data.zero_()  # a copy
    assert source.in_proj_weight.ne(0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "dropout == 0"),
        ({"kdim": 8}, "no kdim or vdim"),
        ({"add_bias_kv": True}, "add_bias_kv=False"),
        ({"add_zero_attn": True}, "add_zero_attn=False"),
        ({"batch_first": False}, r"batch_first=True \(RingAttention takes \[B, S, E\]\)"),
    ],
)
def test_refuses_to_convert(arguments: dict[str, Any], message: str) -> None:
    source = nn.MultiheadAttention(E, 3, **{"batch_first": True, **arguments})
    with pytest.raises(ValueError, match=message):
        RingAttention.from_multihead_attention(source, mask=Full())


def test_copies_share_the_group() -> None:
    def run(group: Any) -> bool:
        module = build({"rope": 10.0}, group)
        twin = copy.deepcopy(module)
        assert twin.q_proj.weight is not module.q_proj.weight
        return twin.group is group

    assert run_virtual(2, run) == [True, True]
    buffer = io.BytesIO()
    torch.save(build({}), buffer)
    buffer.seek(0)
    assert isinstance(torch.load(buffer, weights_only=False), RingAttention)


def test_refuses_sizes() -> None:
    with pytest.raises(ValueError, match=r"heads to divide embed_dim, got 5 and 48"):
        RingAttention(E, 5)
    with pytest.raises(ValueError, match=r"kv_heads to divide heads, got 2 and 3"):
        RingAttention(E, 3, kv_heads=2)
    with pytest.raises(ValueError, match=r"expected heads >= 1, got 0"):
        RingAttention(E, 0)
    with pytest.raises(ValueError, match=r"positive base for rope, got head_dim 16 and rope -1"):
        RingAttention(E, 3, rope=-1.0)
    with pytest.raises(ValueError, match=r"even head_dim"):
        RingAttention(E, 3, head_dim=17, rope=10.0)


def test_refuses_what_does_not_fit_before_any_communication() -> None:
    module = RingAttention(E, 3)
    with pytest.raises(ValueError, match=r"x of shape \[B, S, 48\], got \[2, 5, 47\]"):
        module(torch.zeros(2, 5, 47))
    with pytest.raises(ValueError, match=r"a layout for the 1 ranks of the group, got Zigzag"):
        module(torch.zeros(2, 5, E), Zigzag(10, 2))

    def run(group: Any) -> None:
        module = RingAttention(E, 3, group=group)
        if group.rank == 1:  # alone: what communicated would hang
            return
        x = torch.zeros(1, 5, E)
        with pytest.raises(ValueError, match=r"layout or plan with a group of 2 ranks"):
            module(x)
        with pytest.raises(ValueError, match=r"x\.shape\[1\] == 6, the share of rank 0"):
            module(x, Contiguous(12, 2))
        mine = plan(Full(), Contiguous(10, 2), rank=0)
        with pytest.raises(ValueError, match=r"layout or plan, got both"):
            module(x, Contiguous(10, 2), plan=mine)
        with pytest.raises(ValueError, match=r"plan\.mask == "):
            module(x, plan=mine, mask=Causal())
        windowed = RingAttention(E, 3, window=(3, 0), group=group)
        with pytest.raises(ValueError, match=r"layer\.effective_mask"):
            windowed(x, plan=mine)
        cross = plan(Full(), q_layout=Contiguous(10, 2), k_layout=Zigzag(10, 2), rank=0)
        with pytest.raises(ValueError, match=r"this layer is self-attention"):
            module(x, plan=cross)

    run_virtual(2, run)


def test_window_has_to_be_one() -> None:
    assert RingAttention(E, 3, window=(3, None)).effective_mask() == Causal() & Window(3, None)
    with pytest.raises((ValueError, TypeError)):
        RingAttention(E, 3, window=(-1, 0))
