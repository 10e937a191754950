// SPDX-License-Identifier: BSD-3-Clause
//
// What the environment says about the CUDA kernels.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ring_attention::cuda {

// RING_ATTENTION_CUDA_BACKWARD: "deterministic", as when unset, or "atomic": one kernel instead of
// two, whose dq is added up by atomics and so differs in its last bits from run to run. Hopper's
// own kernels have no such variant and are what runs there either way, but with a softcap.
inline bool deterministic_backward() {
  static const bool deterministic = [] {
    const char* variable = std::getenv("RING_ATTENTION_CUDA_BACKWARD");
    const std::string value = variable == nullptr ? "deterministic" : variable;
    if (value == "deterministic" || value == "atomic") return value == "deterministic";
    throw std::invalid_argument(
        "ring_attention: expected RING_ATTENTION_CUDA_BACKWARD to be deterministic or atomic, got "
        "'" +
        value + "'; unset it for results that are the same bits every time");
  }();
  return deterministic;
}

}  // namespace ring_attention::cuda
