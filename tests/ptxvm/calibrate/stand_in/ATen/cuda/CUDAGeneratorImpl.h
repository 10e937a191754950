// SPDX-License-Identifier: BSD-3-Clause
//
// What FlashAttention's headers take from torch, without torch: the state of random numbers, which
// only dropout uses.
#pragma once

namespace at {

struct PhiloxCudaState {};

}  // namespace at
