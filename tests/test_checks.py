# SPDX-License-Identifier: BSD-3-Clause
"""Every refusal names op, argument, expectation, value and remedy, in Python and in C++."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention import checks, ops

OPS = torch.ops.ring_attention
FLOAT16_STATE = torch.zeros(1, 2, 5, 16, dtype=torch.float16)


def arguments(op: str) -> dict[str, Any]:
    """A valid call of each operator, by argument name, in the order of its schema."""
    q, k, v = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 6, 32), torch.randn(1, 2, 6, 16)
    begin, end = torch.zeros(1, 1, 5).int(), torch.full((1, 1, 5), 6).int()
    wide, row = torch.zeros(1, 4, 5, 16), torch.zeros(1, 4, 5)
    sinks, scale = torch.zeros(4), {"scale": 0.2, "softcap": 0.0}
    bounds = {"key_begin": begin, "key_end": end}
    lists = {name: [x] for name, x in {"k": k, "v": v, **bounds}.items()}
    state = {"acc": wide.clone(), "m": row.clone(), "l": row.clone()}
    output = {"out": wide.clone(), "lse": row.clone()}
    other = {f"other_{name}": x.clone() for name, x in state.items()}
    calls: dict[str, dict[str, Any]] = {
        "forward": {"q": q, "k": k, "v": v, **bounds, "sinks": sinks, **scale},
        "backward": {
            **{"dout": wide, "dlse": row, "q": q, "k": k, "v": v, **output, **bounds},
            **{"sinks": sinks, **scale},
        },
        "block_forward_": {
            **{"q": q, **lists, "sinks": sinks, **state, **output, "first": True, "last": True},
            **scale,
        },
        "block_backward_": {
            **{"q": q, "dout": wide, "lse": row, "delta": row, **lists},
            **{"dq": q.clone(), "dk": [k.clone()], "dv": [v.clone()], **scale},
        },
        "combine_": {**state, **other},
        "finish_": {**state, **output},
        "delta": {"out": wide, "dout": wide, "dlse": row},
        "sink_gradient": {"sinks": sinks, "lse": row, "delta": row},
    }
    return calls[op]


def shape(*sizes: int) -> Tensor:
    return torch.zeros(sizes)


# op, changed arguments, what both messages say
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("forward", {"q": shape(4, 5, 32)}, r"q to have 4 dimensions"),
    ("forward", {"q": shape(1, 4, 5, 32).int()}, r"q\.dtype float32"),
    ("forward", {"q": shape(1, 4, 5, 8)}, r"q\.shape\[3\] in 16, 24, .*got 8"),
    ("forward", {"q": shape(1, 4, 5, 264)}, r"q\.shape\[3\] in 16, 24, .*got 264"),
    ("forward", {"q": shape(1, 4, 5, 36)}, r"q\.shape\[3\] in 16, 24, .*got 36"),
    ("forward", {"q": shape(1, 3, 5, 32), "sinks": None}, r"q\.shape\[1\] to be a multiple"),
    ("forward", {"k": shape(1, 0, 6, 32), "v": shape(1, 0, 6, 16)}, r"q\.shape\[1\] to be a mult"),
    ("forward", {"k": shape(1, 2, 6, 40)}, r"k.*shape"),
    ("forward", {"k": shape(2, 2, 6, 32), "v": shape(2, 2, 6, 16)}, r"k.*shape"),
    ("forward", {"k": shape(1, 2, 6, 32).double()}, r"k.*\.dtype"),
    ("forward", {"v": shape(1, 2, 7, 16)}, r"v.*shape"),
    ("forward", {"v": shape(1, 1, 6, 16)}, r"v.*shape"),
    ("forward", {"v": shape(2, 6, 16)}, r"v to have 4 dimensions"),
    ("forward", {"v": shape(1, 2, 6, 12)}, r"shape\[3\] in 16, 24"),
    ("forward", {"v": shape(1, 2, 6, 16).half()}, r"v.*\.dtype"),
    ("forward", {"key_begin": shape(1, 1, 5).long()}, r"key_begin.*\.dtype"),
    ("forward", {"key_begin": shape(1, 5).int()}, r"key_begin.*\.shape == .*got \[1, 5\]"),
    ("forward", {"key_end": shape(1, 1, 6).int()}, r"key_end.*\.shape == .*got \[1, 1, 6\]"),
    ("forward", {"key_end": shape(1, 2, 5).int()}, r"key_end.*\.shape == "),
    ("forward", {"key_end": shape(2, 1, 5).int()}, r"key_"),
    ("forward", {"sinks": shape(3)}, r"sinks\.shape == \[4\], got \[3\]"),
    ("forward", {"sinks": shape(4).double()}, r"sinks\.dtype"),
    ("forward", {"sinks": shape(8)[::2]}, r"sinks contiguous"),
    ("backward", {"dout": shape(1, 4, 5, 24)}, r"dout\.shape == \[1, 4, 5, 16\]"),
    ("backward", {"dout": shape(1, 4, 5, 16).half()}, r"dout\.dtype"),
    ("backward", {"out": shape(1, 4, 4, 16)}, r"out\.shape"),
    ("backward", {"lse": shape(1, 4, 6)}, r"lse\.shape == \[1, 4, 5\]"),
    ("backward", {"dlse": shape(1, 4, 6)}, r"dlse\.shape == \[1, 4, 5\]"),
    ("backward", {"dlse": shape(1, 4, 5).half()}, r"dlse\.dtype"),
    ("block_forward_", {"v": []}, r"len\(v\) == len\(k\), got 0 and 1"),
    ("block_forward_", {"key_end": []}, r"len\(key_end\) == len\(k\), got 0 and 1"),
    ("block_forward_", {"acc": None}, r"acc, m and l"),
    ("block_forward_", {"acc": None, "m": None, "l": None, "last": False}, r"acc, m and l"),
    ("block_forward_", {"out": None}, r"out and lse with last, got None"),
    ("block_forward_", {"first": False}, r"no sinks unless first"),
    ("block_forward_", {"acc": shape(1, 4, 5, 24)}, r"acc\.shape == \[1, 4, 5, 16\]"),
    ("block_forward_", {"m": shape(1, 4, 5).double()}, r"m\.dtype"),
    ("block_forward_", {"l": shape(1, 4, 10)[..., ::2]}, r"l contiguous"),
    ("block_forward_", {"lse": shape(1, 4, 10)[..., ::2]}, r"lse contiguous"),
    ("block_forward_", {"out": shape(1, 4, 5, 24)}, r"\.shape"),
    ("block_forward_", {"out": shape(1, 4, 5, 16).half()}, r"out\.dtype"),
    ("block_forward_", {"out": shape(1, 4, 1, 16).expand(1, 4, 5, 16)}, r"out with rows of their"),
    ("block_forward_", {"out": shape(1, 4, 16, 5).mT}, r"out with rows of their own"),
    ("block_backward_", {"dk": []}, r"len\(dk\)"),
    ("block_backward_", {"dk": [shape(1, 2, 6, 16)]}, r"dk\[0\]\.shape == \[1, 2, 6, 32\]"),
    ("block_backward_", {"dv": [shape(1, 2, 16, 6).mT]}, r"dv\[0\] contiguous"),
    ("block_backward_", {"dq": shape(1, 4, 5, 32).double()}, r"dq\.dtype"),
    ("block_backward_", {"delta": shape(1, 4, 4)}, r"delta\.shape == \[1, 4, 5\]"),
    ("combine_", {"other_acc": shape(1, 4, 5, 24)}, r"other_acc\.shape == \[1, 4, 5, 16\]"),
    ("combine_", {"other_l": shape(1, 4, 4)}, r"other_l\.shape == \[1, 4, 5\]"),
    ("combine_", {"acc": FLOAT16_STATE}, r"acc\.dtype"),
    ("finish_", {"out": shape(1, 4, 6, 16)}, r"shape == "),
    ("finish_", {"out": shape(1, 4, 5, 16).double()}, r"acc\.dtype"),
    ("finish_", {"out": shape(1, 4, 5, 16).int()}, r"out\.dtype"),
    ("finish_", {"out": shape(1, 4, 5, 1).expand(1, 4, 5, 16)}, r"out with rows of their own"),
    ("delta", {"dout": shape(1, 4, 5, 24)}, r"dout\.shape == \[1, 4, 5, 16\]"),
    ("delta", {"out": shape(4, 5, 16)}, r"out to have 4 dimensions"),
    ("sink_gradient", {"lse": shape(4, 5)}, r"lse"),
    ("sink_gradient", {"delta": shape(1, 4, 4)}, r"delta\.shape == \[1, 4, 5\]"),
    ("sink_gradient", {"sinks": shape(5)}, r"sinks\.shape == \[4\], got \[5\]"),
]


@pytest.mark.parametrize("op", ["forward", "backward", "block_forward_", "block_backward_"])
@pytest.mark.parametrize("layer", [ops, OPS], ids=["python", "c++"])
def test_the_valid_calls_are_valid(layer: Any, op: str) -> None:
    getattr(layer, op)(*arguments(op).values())


@pytest.mark.parametrize(
    ("op", "changed", "message"), REFUSED, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)]
)
def test_python_and_cpp_refuse(op: str, changed: dict[str, Any], message: str) -> None:
    values = {**arguments(op), **changed}.values()
    with pytest.raises(
        (ValueError, TypeError), match=rf"ring_attention\.{op}: expected .*{message}"
    ):
        getattr(ops, op)(*values)
    with pytest.raises(RuntimeError, match=rf"ring_attention\.{op}: expected .*{message}"):
        getattr(OPS, op)(*values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scale_and_softcap_are_finite(value: float) -> None:
    for name in ("scale", "softcap"):
        with pytest.raises(ValueError, match=rf"forward: expected .*{name}.*got {value}"):
            ops.forward(*{**arguments("forward"), name: value}.values())
    with pytest.raises(ValueError, match=r"softcap .*got -1\.0; 0 means none"):
        ops.forward(*{**arguments("forward"), "softcap": -1.0}.values())


def test_devices() -> None:
    values = {**arguments("forward"), "k": shape(1, 2, 6, 32).to("meta")}.values()
    with pytest.raises(ValueError, match=r"expected k\.device == cpu, got meta; move"):
        ops.forward(*values)


def test_gradients_in_the_same_memory() -> None:
    values = arguments("block_backward_")
    for name in ("k", "v", "key_begin", "key_end", "dk", "dv"):
        values[name] = values[name] * 2
    with pytest.raises(RuntimeError, match=r"block_backward_: expected dk and dv that do not over"):
        ops.block_backward_(*values.values())


def test_messages_name_the_block() -> None:
    values = arguments("block_forward_")
    for name in ("k", "v", "key_begin", "key_end"):
        values[name] = [values[name][0], values[name][0]]
    values["k"][1] = shape(1, 2, 6, 40)
    message = r"block_forward_: expected k\[1\]\.shape"
    with pytest.raises(ValueError, match=message):
        ops.block_forward_(*values.values())
    with pytest.raises(RuntimeError, match=message):
        OPS.block_forward_(*values.values())


def test_the_message_is_a_sentence() -> None:
    values = arguments("forward")
    with pytest.raises(ValueError) as refused:
        checks.attention("attention", values["q"], shape(1, 2, 6, 96), values["v"])
    assert str(refused.value) == (
        "ring_attention.attention: expected k.shape[3] == q.shape[3], got 96 and 32; "
        "q and k need the same head_dim"
    )


def test_a_refused_call_writes_nothing() -> None:
    values = arguments("block_forward_")
    values["v"] = [shape(1, 2, 7, 16)]
    values["out"].fill_(7.0)
    for layer in (ops, OPS):
        with pytest.raises((ValueError, RuntimeError)):
            layer.block_forward_(*values.values())
        assert (values["out"] == 7.0).all() and (values["acc"] == 0).all()


def test_fakes_refuse_alike() -> None:
    values = {**arguments("forward"), "k": shape(1, 2, 6, 40)}
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in values.values()]
    with pytest.raises(ValueError, match=r"forward: expected k\.shape\[3\] == q\.shape\[3\]"):
        OPS.forward(*meta)
