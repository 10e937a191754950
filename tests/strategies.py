# SPDX-License-Identifier: BSD-3-Clause
"""Hypothesis strategies for masks and layouts."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

from ring_attention.layout import Contiguous, DocumentBalanced, Layout, Striped, Zigzag
from ring_attention.mask import (
    Causal,
    Chunks,
    Documents,
    FirstTokens,
    Full,
    KeyLength,
    Mask,
    PrefixLM,
    Spans,
    Window,
)

KINDS = ("full", "causal", "window", "prefix", "first", "length", "chunks", "spans", "documents")


@st.composite
def layouts(draw: st.DrawFn, length: int, world_size: int) -> Layout:
    kind = draw(st.sampled_from([Contiguous, Zigzag, Striped, DocumentBalanced]))
    if kind is Striped:
        return Striped(length, world_size, draw(st.integers(1, 9)))
    if kind is DocumentBalanced:
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
        slack = draw(st.sampled_from([1.0, 1.25, 2.0]))
        return DocumentBalanced([0, *cuts, length], world_size, slack)
    return kind(length, world_size)


def _bounds(draw: st.DrawFn, length: int, inner: int) -> list[int]:
    cuts = st.lists(st.integers(0, length), min_size=inner, max_size=inner)
    return [0, *sorted(draw(cuts)), length]


@st.composite
def simple_masks(draw: st.DrawFn, q_len: int, k_len: int, samples: int) -> Mask:
    """One mask without combinations; per-sample ones tell `samples` samples apart."""
    longest = max(q_len, k_len)
    side = st.one_of(st.none(), st.integers(0, longest + 2))
    kind = draw(st.sampled_from(KINDS))
    each = range(draw(st.sampled_from([1, samples])))
    if kind == "causal":
        return Causal(draw(st.booleans()))
    if kind == "window":
        return Window(draw(side), draw(side), draw(st.booleans()))
    if kind == "prefix":
        return PrefixLM([draw(st.integers(0, longest + 2)) for _ in each])
    if kind == "first":
        return FirstTokens(draw(st.integers(0, longest + 2)))
    if kind == "length":
        return KeyLength([draw(st.integers(0, k_len)) for _ in each])
    if kind == "chunks":
        return Chunks(draw(st.integers(1, longest + 2)))
    if kind == "spans":
        return Spans([list(_spans(draw, longest)) for _ in each])
    if kind == "documents":
        inner = draw(st.integers(0, 6))
        q = [_bounds(draw, q_len, inner) for _ in each]
        k = q if q_len == k_len else [_bounds(draw, k_len, inner) for _ in each]
        padding = [sorted(draw(st.sets(st.integers(0, inner), max_size=2))) for _ in each]
        return Documents(q, k, padding)
    return Full()


def _spans(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    bounds = _bounds(draw, length, 4)
    return [(bounds[1], bounds[2]), (bounds[3], bounds[4])]


@st.composite
def masks(draw: st.DrawFn, q_len: int, k_len: int) -> Mask:
    """A mask of one to three parts, joined by & and |, within MAX_INTERVALS intervals per row."""
    samples = draw(st.integers(1, 3))
    mask = draw(simple_masks(q_len, k_len, samples))
    for _ in range(draw(st.integers(0, 2))):
        other = draw(simple_masks(q_len, k_len, samples))
        mask = mask & other if draw(st.booleans()) else mask | other
    try:
        mask.segments(q_len, k_len)
    except ValueError as error:
        assume("key intervals per query row" not in str(error))
        raise
    return mask
