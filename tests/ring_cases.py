# SPDX-License-Identifier: BSD-3-Clause
"""What the ring tests run on every rank, and the unsharded fp64 truth they compare with.

Module-level functions of picklable values, so that the same case runs on virtual ranks and on real
processes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conftest import DEVICE
from ring_attention import attention, reference
from ring_attention.layout import Layout
from ring_attention.mask import Causal, Mask
from ring_attention.plan import plan


@dataclass(frozen=True)
class Case:
    """One unsharded problem."""

    q_len: int
    k_len: int | None = None  # None: q_len
    mask: Mask = field(default_factory=Causal)
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int | None = None
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    softcap: float | None = None
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, dout, dlse and sinks, the same on every rank."""
        gen = torch.Generator("cpu").manual_seed(self.seed)
        k_len = self.q_len if self.k_len is None else self.k_len
        v_dim = self.v_head_dim or self.head_dim

        def normal(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=gen, dtype=torch.float64, device="cpu")
            return made.to(DEVICE, self.dtype)

        made = {
            "q": normal(self.batch, self.heads, self.q_len, self.head_dim),
            "k": normal(self.batch, self.kv_heads, k_len, self.head_dim),
            "v": normal(self.batch, self.kv_heads, k_len, v_dim),
            "dout": normal(self.batch, self.heads, self.q_len, v_dim),
        }
        made["dlse"] = normal(self.batch, self.heads, self.q_len).float()
        if self.sinks:
            made["sinks"] = normal(self.heads).float()
        return made

    def visible(self) -> Tensor:
        k_len = self.q_len if self.k_len is None else self.k_len
        return self.mask.dense(self.q_len, k_len).to(DEVICE)


Results = dict[str, Tensor]


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Results:
    """The reference's out, lse and gradients in `dtype`, on the inputs as rounded."""
    made = {name: x.to(dtype) for name, x in case.tensors().items()}
    leaves = {n: made[n].requires_grad_() for n in ("q", "k", "v", "sinks") if n in made}
    out, lse = reference.attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.visible(),
        softcap=case.softcap or 0.0,
        sinks=leaves.get("sinks"),
    )
    finite = lse.isfinite()
    loss = (out * made["dout"]).sum() + (lse.where(finite, 0) * made["dlse"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def run_rank(
    group: Any,
    case: Case,
    q_layout: Layout,
    k_layout: Layout | None = None,
    schedule: dict[str, Any] | None = None,
) -> Results:
    """One rank's shard of out, lse and gradients; `schedule`: arguments of plan, none without."""
    k_layout = k_layout or q_layout
    made = case.tensors()
    shards = {
        name: layout.shard(made[name], group, dim=2).detach().requires_grad_()
        for name, layout in (("q", q_layout), ("k", k_layout), ("v", k_layout))
    }
    dout = q_layout.shard(made["dout"], group, dim=2)
    dlse = q_layout.shard(made["dlse"], group, dim=2)
    if "sinks" in made:
        shards["sinks"] = made["sinks"].requires_grad_()
    how: dict[str, Any] = {"mask": case.mask, "q_layout": q_layout, "k_layout": k_layout}
    if schedule is not None:
        how = {"plan": plan(**how, group=group, **schedule)}
    out, lse = attention(
        shards["q"],
        shards["k"],
        shards["v"],
        **how,
        group=group,
        softcap=case.softcap,
        sinks=shards.get("sinks"),
        return_lse=True,
    )
    loss = (out * dout).sum() + (lse.where(lse.isfinite(), 0) * dlse).sum()
    loss.backward()
    results = {"out": out.detach(), "lse": lse.detach()}
    for name, leaf in shards.items():
        assert leaf.grad is not None, name
        results[f"d{name}"] = leaf.grad
    return results


def join(parts: list[Results], q_layout: Layout, k_layout: Layout | None = None) -> Results:
    """Puts the ranks' shards back in order; parameter gradients are partial sums."""
    k_layout = k_layout or q_layout
    joined: Results = {}
    for name, first in parts[0].items():
        if name == "dsinks":
            joined[name] = torch.stack([part[name].double() for part in parts]).sum(0)
            continue
        layout = k_layout if name in ("dk", "dv") else q_layout
        whole = torch.full(
            (*first.shape[:2], layout.length, *first.shape[3:]),
            torch.nan,
            dtype=first.dtype,
            device=first.device,
        )
        for rank, part in enumerate(parts):
            whole[:, :, layout.positions(rank).to(DEVICE)] = part[name]
        joined[name] = whole
    return joined


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; infinities must be the same ones."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert got[finite].isfinite().all()
    if not finite.any():
        return 0.0
    scale = want[finite].abs().max().clamp(min=1e-30)
    return float((got[finite] - want[finite]).abs().max() / scale)


def assert_exact(got: Results, case: Case) -> None:
    """Errors at most twice those of the plain computation in the same dtype.

    The plain computation's own error can be luckily small on a tiny problem, so a few roundings of
    the dtype are allowed before it counts.
    """
    want = truth(case)
    plain = truth(case, case.dtype)
    floor = 4 * torch.finfo(case.dtype).eps
    assert got.keys() == want.keys()
    for name in want:
        bound = 2 * error(plain[name].to(case.dtype), want[name]) + floor
        if name == "lse" and case.dtype != torch.float32:
            # lse is fp32 whatever the inputs; exp2 of 16-bit kernels is good to 2^-13.
            bound = 2 * error(truth(case, torch.float32)[name], want[name]) + 2**-13
        if name == "dsinks":
            # A sum over all rows with signs that cancel: their roundings add like a random walk.
            bound += floor * (case.batch * case.q_len) ** 0.5
        found = error(got[name], want[name])
        assert found <= bound, f"{name}: error {found:.2e}, bound {bound:.2e}"


def loop_forward(plan: Any, group: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The ring's forward without the agreement between ranks."""
    from ring_attention import loop

    return loop.forward(plan, group, q, k, v, None, 1.0, 0.0)
