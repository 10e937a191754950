# SPDX-License-Identifier: BSD-3-Clause
"""The inputs of million.py, row by row, and sampled rows of its results against float64.

Every input row follows from its position, so any process can make any rows. Queries are three times
normal: a row then attends to some hundred keys of a million. With plain normal ones its output
would be a mean of nearly all values, as small as what bf16 may round away, and the checks would say
little. dout is not negative, so that the sum of its rows does not cancel.

Checked are out, lse and dq of sampled queries (keys made again in chunks) and dk and dv of sampled
keys (over the queries of all ranks); gradients at the out and lse that the forward returned. And,
without an oracle: the rows of dv sum to those of dout, because probabilities sum to one.

Bounds are worst cases of what is rounded to the dtype (unit u = 2^-8 in bf16, 2^-24 in fp32) and
random walks of fp32 sums (e):

    out   u |out| + (u + e) sum_j p_ij |v_j|
    lse   e + 2^-24 |lse|
    dq    u |dq| + scale sum_j slack_ij |k_j|,    slack = u |dS| + e p (|dP| + |delta|)
    dk    u |dk| + scale sum_i slack_ij |q_i|
    dv    u |dv| + (u + e) sum_i p_ij |dout_i|;   of the sum, the sum of this with |dv| as returned
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import ring_attention as ra

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = ("q", "k", "v", "dout")
CHUNK = 4096  # positions made from one seed; rows taken in float64 at a time


@dataclass(frozen=True)
class Problem:
    tokens: int
    ranks: int
    head_dim: int
    dtype: str
    backward: bool
    samples: int

    @property
    def layout(self) -> ra.Layout:
        return ra.Zigzag(self.tokens, self.ranks)

    @property
    def pairs(self) -> float:
        """Query-key pairs that the causal mask shows."""
        return self.tokens * (self.tokens + 1) / 2

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Positions [begin, end) of an input, [end - begin, D]."""
        parts = []
        for index in range(begin // CHUNK, -(-end // CHUNK)):
            gen = torch.Generator().manual_seed(len(INPUTS) * index + INPUTS.index(name))
            make = torch.rand if name == "dout" else torch.randn
            x = make(CHUNK, self.head_dim, generator=gen) * (3 if name == "q" else 1)
            first = index * CHUNK
            parts.append(x[max(begin - first, 0) : end - first].to(DTYPES[self.dtype]))
        return torch.cat(parts)

    def shard(self, name: str, rank: int) -> Tensor:
        """A rank's rows, [1, 1, S, D]; no more than a chunk exists besides."""
        x = torch.empty(self.layout.sizes[rank], self.head_dim, dtype=DTYPES[self.dtype])
        at = 0
        for start, block, _, _ in self.layout.runs(rank):  # zigzag: runs of consecutive rows
            for begin in range(start, start + block, CHUNK):
                part = self.rows(name, begin, min(begin + CHUNK, start + block))
                x[at : at + len(part)] = part
                at += len(part)
        return x[None, None]

    def sampled(self) -> Tensor:
        """Some positions, ascending: the first, the last, all edges of shards, and random ones."""
        runs = [run for rank in range(self.ranks) for run in self.layout.runs(rank)]
        edges = [at for start, block, _, _ in runs for at in (start, start + block - 1)]
        gen = torch.Generator().manual_seed(0)
        random = torch.randint(self.tokens, (max(self.samples - len(edges), 0),), generator=gen)
        return torch.cat([torch.tensor(edges), random]).unique()


@dataclass(frozen=True)
class Check:
    """The element of a result that is closest to its bound, or beyond."""

    of_bound: float  # error / bound
    error: float
    bound: float
    largest: float  # error of any element
    rms: float  # of the right values, for comparison


def compare(got: Tensor, want: Tensor, bound: Tensor) -> Check:
    error, bound = (got - want).abs().flatten(), bound.flatten()
    of_bound = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf)
    worst = int(of_bound.argmax())
    rms, largest = want.square().mean().sqrt(), error.max()
    return Check(*(float(x) for x in (of_bound[worst], error[worst], bound[worst], largest, rms)))


class Oracle:
    """Checks one rank's results; every rank makes one and calls the same methods.

    Args:
        problem: what was computed.
        inputs: this rank's shards of `INPUTS` (dout for the backward only), [S, D].
        results: out and lse, and dq, dk, dv for the backward, as returned, without B and H.
    """

    def __init__(
        self, problem: Problem, inputs: dict[str, Tensor], results: dict[str, Tensor]
    ) -> None:
        self.problem, self.inputs, self.results = problem, inputs, results
        self.scale: float = problem.head_dim**-0.5
        self.unit = 2.0**-8 if problem.dtype == "bf16" else 2.0**-24
        # Sums over keys, and within scores, of magnitude 32; 16-bit kernels have a shorter exp2.
        walk = math.sqrt(problem.tokens) + 32 * math.sqrt(problem.head_dim)
        self.fp32 = 2.0**-24 * walk + (2.8e-6 if problem.dtype == "bf16" else 0.0)
        self.positions = problem.layout.positions(dist.get_rank())
        self.sampled = problem.sampled()
        self.own = torch.isin(self.sampled, self.positions)
        self.local = torch.searchsorted(self.positions, self.sampled[self.own])

    def checks(self) -> dict[str, Check]:
        checks = self.queries()
        if self.problem.backward:
            checks |= self.keys() | self.sum_of_dv()
        return checks

    def scores(self, q: Tensor, q_at: Tensor, k: Tensor, k_at: Tensor) -> Tensor:
        return (self.scale * (q @ k.T)).masked_fill_(k_at > q_at[:, None], -math.inf)

    def score_gradients(
        self, p: Tensor, dout: Tensor, v: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those of unscaled scores, and by how much the kernels' may differ."""
        dp, delta = dout @ v.T, delta[:, None]
        ds = p * (dp - delta)
        slack = self.unit * ds.abs() + self.fp32 * p * (dp.abs() + delta.abs())
        return self.scale * ds, self.scale * slack

    def key_chunks(self, end: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions, k and v of all keys before `end`, made again."""
        for begin in range(0, end, CHUNK):
            stop = min(begin + CHUNK, end)
            k, v = (self.problem.rows(name, begin, stop).double() for name in ("k", "v"))
            yield torch.arange(begin, stop), k, v

    def queries(self) -> dict[str, Check]:
        """Of this rank's sampled queries; their softmax is found from scratch."""
        at = self.sampled[self.own]
        mine = {name: x[self.local].double() for name, x in self.inputs.items()}
        got = {name: x[self.local].double() for name, x in self.results.items()}
        lse = torch.full((len(at),), -math.inf, dtype=torch.float64)
        out, out_bound, dq, dq_bound = torch.zeros(4, *got["out"].shape, dtype=torch.float64)
        for k_at, k, _ in self.key_chunks(int(at[-1]) + 1):
            lse = torch.logaddexp(lse, self.scores(mine["q"], at, k, k_at).logsumexp(1))
        for k_at, k, v in self.key_chunks(int(at[-1]) + 1):
            p = torch.exp(self.scores(mine["q"], at, k, k_at) - lse[:, None])
            out += p @ v
            out_bound += (self.unit + self.fp32) * (p @ v.abs())
            if self.problem.backward:
                delta = (mine["dout"] * got["out"]).sum(1)
                ds, slack = self.score_gradients(p, mine["dout"], v, delta)
                dq += ds @ k
                dq_bound += slack @ k.abs()
        checks = {
            "out": compare(got["out"], out, out_bound + self.unit * out.abs()),
            "lse": compare(got["lse"], lse, self.fp32 + 2.0**-24 * lse.abs()),
        }
        if self.problem.backward:
            checks["dq"] = compare(got["dq"], dq, dq_bound + self.unit * dq.abs())
        return checks

    def keys(self) -> dict[str, Check]:
        """Of all sampled keys: each rank adds what its queries give them; owners compare."""
        sampled = [int(at) for at in self.sampled]
        k, v = (
            torch.cat([self.problem.rows(name, at, at + 1) for at in sampled]).double()
            for name in ("k", "v")
        )
        dk, dk_bound, dv, dv_bound = sums = torch.zeros(4, *k.shape, dtype=torch.float64)
        for begin in range(0, len(self.positions), CHUNK):
            part = slice(begin, begin + CHUNK)
            q, dout = (self.inputs[name][part].double() for name in ("q", "dout"))
            out, lse = (self.results[name][part].double() for name in ("out", "lse"))
            scores = self.scores(q, self.positions[part], k, self.sampled)
            p = torch.exp(scores - lse[:, None])
            ds, slack = self.score_gradients(p, dout, v, (dout * out).sum(1))
            dk += ds.T @ q
            dk_bound += slack.T @ q.abs()
            dv += p.T @ dout
            dv_bound += (self.unit + self.fp32) * (p.T @ dout.abs())
        dist.all_reduce(sums)
        return {
            name: compare(
                self.results[name][self.local].double(),
                want[self.own],
                (bound + self.unit * want.abs())[self.own],
            )
            for name, want, bound in (("dk", dk, dk_bound), ("dv", dv, dv_bound))
        }

    def sum_of_dv(self) -> dict[str, Check]:
        sums = torch.zeros(4, self.problem.head_dim, dtype=torch.float64)
        for i, x in enumerate((self.results["dv"], self.inputs["dout"])):
            for part in x.split(CHUNK):
                sums[i] += part.double().sum(0)
                sums[2 + i] += part.double().abs().sum(0)
        dist.all_reduce(sums)
        dv, dout, dv_magnitude, dout_magnitude = sums
        bound = self.unit * dv_magnitude + (self.unit + self.fp32) * dout_magnitude
        return {"sum of dv": compare(dv, dout, bound)}
