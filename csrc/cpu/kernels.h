// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU kernels as the rest of the extension sees them: one table of instruction sets, each with
// the same two kernels, and the small row-wise helpers that need none.
#pragma once

#include <cstdint>
#include <span>

#include "../params.h"

namespace ring_attention::cpu {

// (acc, m, l) += (other_acc, other_m, other_l): joins two states of the same rows, see Note
// [state]. acc [rows, v_head_dim], m and l [rows], all contiguous and of `state`'s dtype.
void combine(DType state, int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
             const void* other_acc, const void* other_m, const void* other_l,
             const Parallel& parallel);

// (out, lse) from (acc, m, l), the last step of a forward.
void finish(const ForwardParams& params, const Parallel& parallel);

// See DeltaParams.
void delta(const DeltaParams& params, const Parallel& parallel);

// dsinks[h] = -sum over samples and rows of exp(sinks[h] - lse) delta. sinks and dsinks [heads],
// lse and delta [batch, heads, q_len], all contiguous and of `state`'s dtype.
void sink_gradient(DType state, const void* sinks, const void* lse, const void* delta, void* dsinks,
                   int64_t batch, int64_t heads, int64_t q_len, const Parallel& parallel);

// One row of the dispatch table.
struct Isa {
  const char* name;       // what RING_ATTENTION_CPU calls it
  bool (*supported)();    // this machine can run it
  bool (*recommended)();  // and nothing later in the table is faster where it is supported
  void (*forward)(const ForwardParams& params, const Parallel& parallel);
  void (*backward)(const BackwardParams& params, const Parallel& parallel);
  // Floating point operations per second of a register-only loop of the instruction that this
  // row's kernels multiply `dtype` with, run on the calling thread for `seconds`.
  double (*peak_flops)(DType dtype, double seconds);

  int64_t alignment = 0;  // of the rows it is given, in bytes; 0: of an element
  // Bound by memory: plain loops serve.
  decltype(&cpu::combine) combine = cpu::combine;
  decltype(&cpu::finish) finish = cpu::finish;
  decltype(&cpu::delta) delta = cpu::delta;
  decltype(&cpu::sink_gradient) sink_gradient = cpu::sink_gradient;
};

// All rows, best first, also those this machine does not support.
std::span<const Isa> isas();

// The row in use, chosen once: the one RING_ATTENTION_CPU names, else the first recommended one.
// Throws std::invalid_argument where the variable names an unknown or unsupported row.
const Isa& isa();

}  // namespace ring_attention::cpu
