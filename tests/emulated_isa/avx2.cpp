// SPDX-License-Identifier: BSD-3-Clause
//
// In place of isa_avx2.cpp, whose kernels need no emulation and would be compiled for nothing.
#include "../../csrc/cpu/isa.h"

namespace ring_attention::cpu::avx2 {
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace ring_attention::cpu::avx2
