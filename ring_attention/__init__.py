# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention over sequences sharded across the ranks of a process group."""

from . import trace
from .agreed_plan import agree
from .costs import break_even
from .feed_forward import BlockwiseFeedForward
from .figures import Device, Link, Machine
from .function import attention
from .gradients import sum_gradients
from .groups import all_gather, all_reduce_, rank_of, size_of
from .layout import Contiguous, DocumentBalanced, Layout, Striped, Zigzag
from .loss import linear_cross_entropy, shift_labels
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
from .module import RingAttention
from .ops import isa_name, isa_names
from .plan import Plan, plan
from .predict import predict
from .prediction import Candidate, Prediction
from .ring import RingError
from .sdpa import scaled_dot_product_attention
from .shapes import Shapes
from .transformer import RingTransformerBlock
from .virtual import VirtualGroup, run_virtual

__version__ = "0.1.0"

__all__ = [
    "BlockwiseFeedForward",
    "Candidate",
    "Causal",
    "Chunks",
    "Contiguous",
    "Device",
    "DocumentBalanced",
    "Documents",
    "FirstTokens",
    "Full",
    "KeyLength",
    "Layout",
    "Link",
    "Machine",
    "Mask",
    "Plan",
    "Prediction",
    "PrefixLM",
    "RingAttention",
    "RingError",
    "RingTransformerBlock",
    "Shapes",
    "Spans",
    "Striped",
    "VirtualGroup",
    "Window",
    "Zigzag",
    "agree",
    "all_gather",
    "all_reduce_",
    "attention",
    "break_even",
    "isa_name",
    "isa_names",
    "linear_cross_entropy",
    "plan",
    "predict",
    "rank_of",
    "run_virtual",
    "scaled_dot_product_attention",
    "shift_labels",
    "size_of",
    "sum_gradients",
    "trace",
]
