// SPDX-License-Identifier: BSD-3-Clause
#include <array>
#include <mutex>

#include "launch.h"
#include "sm90/warps.h"

namespace ring_attention::cuda {

Device device_of(int ordinal) {
  static std::mutex mutex;
  static std::array<Device, 64> known;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, ordinal);
    return value;
  };
  if (ordinal < 0 || ordinal >= static_cast<int>(known.size())) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = known[static_cast<size_t>(ordinal)];
  if (device.sm_count == 0) {
    device = {.sm_count = ask(cudaDevAttrMultiProcessorCount),
              .smem_optin_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
              .hopper = ask(cudaDevAttrComputeCapabilityMajor) == 9};
    device.hopper = device.hopper && device.smem_optin_bytes >= sm90::kMostSmemBytes;
  }
  return device;
}

}  // namespace ring_attention::cuda
