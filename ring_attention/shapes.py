# SPDX-License-Identifier: BSD-3-Clause
"""The tensors of a call, and how many bytes travel for their rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from .mask_algebra import at_least, refuse

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Shapes:
    """The tensors of a call, but for the sequence: that is in the layout.

    Args:
        heads, kv_heads: of queries and of keys; heads is a multiple of kv_heads.
        head_dim: of q and k.
        v_head_dim: of v; head_dim by default.
        dtype: "bfloat16", "float16", "float32" or "float64".
        batch: samples.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int = 0
    dtype: str = "bfloat16"
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim", "batch"):
            at_least("Shapes", name, getattr(self, name), 1, "it counts")
        if self.heads % self.kv_heads:
            got = (self.heads, self.kv_heads)
            refuse("Shapes", "heads to be a multiple of kv_heads", got, "as GQA needs")
        if self.dtype not in _BYTES:
            refuse("Shapes", f"a dtype of {sorted(_BYTES)}", repr(self.dtype), "pass one of them")

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> Shapes:
        """Those of a call's tensors [B, heads, S, D]; also of meta tensors."""
        (batch, heads, _, head_dim), (_, kv_heads, _, v_head_dim) = q.shape, v.shape
        dtype = str(q.dtype).removeprefix("torch.")
        return Shapes(heads, kv_heads, head_dim, v_head_dim, dtype, batch)

    def share(self, degree: int) -> Shapes:
        """Of one rank's heads under Ulysses; the degree divides kv_heads."""
        heads, kv_heads = self.heads // degree, self.kv_heads // degree
        return dataclasses.replace(self, heads=heads, kv_heads=kv_heads)

    @property
    def element_bytes(self) -> int:
        """Of q, k, v and out."""
        return _BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """Of an element of the running state and of gradients under way."""
        return max(4, self.element_bytes)

    @property
    def flops_per_pair(self) -> int:
        """Forward, all heads."""
        return 2 * self.heads * (self.head_dim + self.v_head_dim)

    def kv_bytes(self, rows: int) -> int:
        """K and V of so many rows."""
        both = self.head_dim + self.v_head_dim
        return self.batch * rows * self.kv_heads * both * self.element_bytes

    def grad_bytes(self, rows: int) -> int:
        """Their gradients, as they are summed and sent."""
        return self.kv_bytes(rows) // self.element_bytes * self.state_bytes

    def query_bytes(self, rows: int, elements: int, statistics: int = 0) -> int:
        """Of so many rows of queries: elements of the inputs' dtype, and of the state's."""
        each = elements * self.element_bytes + statistics * self.state_bytes
        return self.batch * rows * self.heads * each

    def block_bytes(self, traveller: str, backward: bool, rows: int) -> int:
        """What goes out for rows of a block: K and V, or Q, in the backward with dO, lse, delta."""
        if traveller == "kv":
            return self.kv_bytes(rows)
        if backward:
            return self.query_bytes(rows, self.head_dim + self.v_head_dim, 2)
        return self.query_bytes(rows, self.head_dim)

    def home_bytes(self, traveller: str, backward: bool, rows: int) -> int:
        """What comes home for them: dK/dV, or of queries a state or dQ; nothing of K/V forward."""
        if traveller == "kv":
            return self.grad_bytes(rows) if backward else 0
        return self.query_bytes(rows, 0, self.head_dim if backward else self.v_head_dim + 2)
