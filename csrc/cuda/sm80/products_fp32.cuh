// SPDX-License-Identifier: BSD-3-Clause
//
// How float32's kernels sum products: alike in the forward and the backward, or of scores in the
// hundreds another order would make another P than the one lse is the sum of.
#pragma once

#include "../ptx.cuh"

namespace ring_attention::cuda::sm80 {

// sum + a.b, four at a time: one chain over a head dim would have twice the error where its partial
// sums are all large.
RA_DEVICE float multiply_add(const float4& a, const float4& b, float sum) {
  return sum + fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
}

}  // namespace ring_attention::cuda::sm80
