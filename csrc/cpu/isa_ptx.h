// SPDX-License-Identifier: BSD-3-Clause
//
// The rows of the ISA table that test builds have (make vm): the CUDA kernels, their PTX executed
// on the CPU by tests/ptxvm. They have only the portable row beside them. One implementation: which
// of the rows was chosen says what device it is.
#pragma once

#include "kernels.h"

namespace ring_attention::cpu::ptx {

// The row whose device is Hopper, and so has kernels of its own (csrc/cuda/sm90).
constexpr char kHopper[] = "ptx-sm90";

bool supported();
bool recommended();  // never
void forward(const ForwardParams& params, const Parallel& parallel);
void backward(const BackwardParams& params, const Parallel& parallel);
double peak_flops(DType dtype, double seconds);
void combine(DType state, int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
             const void* other_acc, const void* other_m, const void* other_l,
             const Parallel& parallel);
void finish(const ForwardParams& params, const Parallel& parallel);
void delta(const DeltaParams& params, const Parallel& parallel);
void sink_gradient(DType state, const void* sinks, const void* lse, const void* delta, void* dsinks,
                   int64_t batch, int64_t heads, int64_t q_len, const Parallel& parallel);

}  // namespace ring_attention::cpu::ptx
