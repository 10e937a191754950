# SPDX-License-Identifier: BSD-3-Clause
"""What kernel.py measures: cases by name, their inputs, and the calls of ours and of torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_attention.mask import Causal, Documents, Full, Mask, Window

# What torch may compute with: None leaves the choice to it.
SDPA = {
    "any": None,
    "flash": SDPBackend.FLASH_ATTENTION,  # on CUDA FlashAttention-2
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """What is computed: torch is asked for the same, where it has it."""

    mask: Mask
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    softcap: float = 0.0
    sinks: bool = False
    v_head_dim: int | None = None  # None: head_dim
    storage: str = "bhsd"  # or "bshd": rows of a head are a row of all heads apart
    scores: str = "normal"  # "peaked", or "rising": every key beats those before it

    @property
    def has_peer(self) -> bool:
        return not self.sinks and self.softcap == 0.0 and self.scores == "normal"


def case_named(name: str, length: int, heads: int) -> Case:
    full = Case(Full(), length, length, heads, heads)
    sixteenth = max(length // 16, 1)
    documents = Causal() & Documents([*range(0, length, sixteenth), length])
    cases = {
        "full": full,
        "causal": Case(Causal(), length, length, heads, heads),
        "window": Case(Causal() & Window(511, 0), length, length, heads, heads),
        "documents": Case(documents, length, length, heads, heads),
        "gqa": Case(Full(), length, length, 8, 2),
        "softcap": Case(Full(), length, length, heads, heads, softcap=30.0),
        "sinks": Case(Full(), length, length, heads, heads, sinks=True),
        "bshd": replace(full, storage="bshd"),
        "peaked": replace(full, scores="peaked"),
        "rising": replace(full, scores="rising"),
    }
    for prefix, case in (
        ("short", lambda n: Case(Full(), n, n, heads, heads)),
        ("decode", lambda n: Case(Full(), n, 65536, 8, 2)),
        ("v", lambda n: replace(full, v_head_dim=n)),
    ):
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit():
            return case(int(name.removeprefix(prefix)))
    if name not in cases:
        raise SystemExit(
            f"kernel.py: expected --case of {', '.join(cases)}, shortN, decodeN or vN, got {name}"
        )
    return cases[name]


def tiles_touched(begin: Tensor, end: Tensor, k_len: int) -> int:
    """Query-key pairs of the 64 x 64 tiles with a visible pair; intervals [1, 1, Sq]."""
    keys = torch.arange(0, k_len, 64)
    rows = (begin[0, 0][:, None] < keys + 64) & (keys < end[0, 0][:, None])
    touched = 0
    for i in range(0, rows.shape[0], 64):
        part = rows[i : i + 64]
        touched += int(part.any(dim=0).sum()) * part.shape[0] * min(64, k_len)
    return touched


def stored(x: Tensor, storage: str) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if storage == "bshd" else x


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    begin: Tensor
    end: Tensor
    case: Case
    name: str

    @classmethod
    def make(cls, name: str, case: Case, dtype: torch.dtype, head_dim: int, device: str) -> Problem:
        torch.manual_seed(0)
        wide = case.v_head_dim or head_dim
        queries, keys = (case.heads, case.q_len), (case.kv_heads, case.k_len)
        shapes = [(*queries, head_dim), (*keys, head_dim), (*keys, wide), (*queries, wide)]
        q, k, v, dout = (torch.randn(1, *shape) for shape in shapes)
        if case.scores == "peaked":
            q *= 50
        if case.scores == "rising":  # by a quarter per key: a new maximum for every few of them
            q.fill_(0.125)
            k.copy_(torch.arange(case.k_len)[:, None] * 0.25 * 8 * head_dim**-0.5)
        q, k, v, dout = (stored(x.to(device, dtype), case.storage) for x in (q, k, v, dout))
        begin, end = (
            x.to(device, torch.int32) for x in case.mask.intervals(case.q_len, case.k_len)
        )
        return cls(q, k, v, dout, begin, end, case, name)

    @property
    def scale(self) -> float:
        return float(self.q.shape[3] ** -0.5)

    @property
    def visible(self) -> int:
        return int((self.end.long() - self.begin.long()).clamp(min=0).sum())

    def flops(self, direction: str, pairs: int) -> float:
        """Products and sums: Q K^T, P V; in the backward also dO V^T, P^T dO, dS K, dS^T Q."""
        dim, wide = self.q.shape[3], self.v.shape[3]
        per_pair = dim + wide if direction == "forward" else 3 * dim + 2 * wide
        return 2.0 * per_pair * self.case.heads * pairs

    def ours(self) -> dict[str, Callable[[], object]]:
        ring, case = torch.ops.ring_attention, self.case
        q, k, v = self.q, self.k, self.v
        sinks = torch.zeros(case.heads, device=q.device) if case.sinks else None
        rest = (self.begin, self.end, sinks, self.scale, case.softcap)
        out, lse = ring.forward(q, k, v, *rest)
        return {
            "forward": lambda: ring.forward(q, k, v, *rest),
            "backward": lambda: ring.backward(self.dout, None, q, k, v, out, lse, *rest),
        }

    def torchs(self, ours: Callable[[], object], sdpa: str) -> dict[str, Callable[[], object]]:
        """torch has one fast mask; the others it takes as a dense boolean. `ours`: to compare.

        Empty where the backend that `sdpa` names does not take the problem.
        """
        case = self.case
        if not case.has_peer:
            return {}
        causal = self.name == "causal"
        dense = None
        if not causal and not isinstance(case.mask, Full):
            dense = case.mask.dense(case.q_len, case.k_len)[:, None].to(self.q.device)
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]

        def attention(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(SDPA[sdpa]) if SDPA[sdpa] else nullcontext():
                return F.scaled_dot_product_attention(
                    *qkv, attn_mask=dense, is_causal=causal, enable_gqa=case.heads != case.kv_heads
                )

        try:
            graph = attention(*leaves)
        except RuntimeError as error:
            if SDPA[sdpa] and ("No available" in str(error) or "No viable" in str(error)):
                return {}
            raise
        error = (ours()[0].float() - graph.detach().float()).abs().max().item()  # type: ignore[index]
        if error > 0.05:
            raise SystemExit(f"kernel.py: expected torch's result, got an error of {error}")
        return {
            "forward": lambda: attention(self.q, self.k, self.v),
            "backward": lambda: torch.autograd.grad(graph, leaves, self.dout, retain_graph=True),
        }
