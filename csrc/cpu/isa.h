// SPDX-License-Identifier: BSD-3-Clause
//
// What the isa_*.cpp files define for dispatch.cpp, and for one another: fp64 always runs on the
// portable row, and a row may leave other element types to the next best one.
#pragma once

#include "kernels.h"

namespace ring_attention::cpu {

namespace scalar {
bool supported();
void forward(const ForwardParams& params, const Parallel& parallel);
void backward(const BackwardParams& params, const Parallel& parallel);
double peak_flops(DType dtype, double seconds);
}  // namespace scalar

}  // namespace ring_attention::cpu
