// SPDX-License-Identifier: BSD-3-Clause
//
// How every kernel is started.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstdint>
#include <type_traits>

namespace ring_attention::cuda {

// Starts a grid of so many blocks; none is fine. smem_bytes: dynamic shared memory of a block.
template <typename... Parameters>
cudaError_t start(void (*kernel)(Parameters...), int64_t blocks, int threads, int smem_bytes,
                  cudaStream_t stream, const std::type_identity_t<Parameters>&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (smem_bytes > 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error != cudaSuccess) return error;
  }
  void* pointers[] = {const_cast<Parameters*>(&arguments)...};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), pointers,
                          static_cast<size_t>(smem_bytes), stream);
}

}  // namespace ring_attention::cuda
