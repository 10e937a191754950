// SPDX-License-Identifier: BSD-3-Clause
//
// What the isa_*.cpp files define for dispatch.cpp, and for one another: fp64 always runs on the
// portable row, and a row may leave other element types to the next best one.
#pragma once

#include "kernels.h"

#if defined(__x86_64__)
#define RA_X86
#endif

namespace ring_attention::cpu {

#define RA_DECLARE_ISA(isa)                                              \
  namespace isa {                                                        \
  bool supported();                                                      \
  void forward(const ForwardParams& params, const Parallel& parallel);   \
  void backward(const BackwardParams& params, const Parallel& parallel); \
  double peak_flops(DType dtype, double seconds);                        \
  }
RA_DECLARE_ISA(scalar)
#ifdef RA_X86
RA_DECLARE_ISA(avx2)
RA_DECLARE_ISA(avx512)
RA_DECLARE_ISA(avx512_bf16)
RA_DECLARE_ISA(amx)
namespace avx512_bf16 {
bool recommended();
}
#endif
#undef RA_DECLARE_ISA

}  // namespace ring_attention::cpu
