# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention over sequences sharded across the ranks of a process group."""

from . import trace
from .function import agree, attention
from .layout import Contiguous, Layout, Striped, Zigzag
from .mask import (
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
from .ops import isa_name, isa_names
from .plan import Plan, plan
from .ring import RingError, all_gather, all_reduce_, rank_of, size_of
from .virtual import VirtualGroup, run_virtual

__version__ = "0.1.0"

__all__ = [
    "Causal",
    "Chunks",
    "Contiguous",
    "Documents",
    "FirstTokens",
    "Full",
    "KeyLength",
    "Layout",
    "Mask",
    "Plan",
    "PrefixLM",
    "RingError",
    "Spans",
    "Striped",
    "VirtualGroup",
    "Window",
    "Zigzag",
    "agree",
    "all_gather",
    "all_reduce_",
    "attention",
    "isa_name",
    "isa_names",
    "plan",
    "rank_of",
    "run_virtual",
    "size_of",
    "trace",
]
