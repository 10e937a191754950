# SPDX-License-Identifier: BSD-3-Clause
"""The operators. Each has a typed wrapper, its fake kernel and its autograd, in this order.

Two families. `forward` and `backward` are functional and differentiable: attention of one process.
The others work in place on a running state and are what a ring is made of: `block_forward_` folds
a few K/V blocks into `(acc, m, l)`, `block_backward_` adds their gradients, `combine_` joins two
states, `finish_` turns a state into `(out, lse)`. They are not differentiable and refuse tensors
that require grad.

S is the state's dtype: float32, and float64 for float64 inputs (on the CPU; CUDA has no kernels
for them). Masks are intervals: row i of sample b sees key j of a block iff
key_begin[n, b, i] <= j < key_end[n, b, i] for some n (int32 [n, batch or 1, q_len], any strides;
bounds outside [0, k_len] are clamped; the intervals of a row are disjoint). The mathematics is in
`ring_attention.reference`.

q, k, v, dout may have any outer strides. One whose last dimension is not contiguous, or whose
address is not a multiple of its element size, is copied once.
"""

from .checks import state_dtype
from .library import isa_name, isa_names, peak_flops
from .ops_attention import backward, forward
from .ops_blocks import block_backward_, block_forward_, fold_, fold_backward_
from .ops_state import combine_, delta, empty_output, empty_state, finish_, sink_gradient

__all__ = [
    "backward",
    "block_backward_",
    "block_forward_",
    "combine_",
    "delta",
    "empty_output",
    "empty_state",
    "finish_",
    "fold_",
    "fold_backward_",
    "forward",
    "isa_name",
    "isa_names",
    "peak_flops",
    "sink_gradient",
    "state_dtype",
]
