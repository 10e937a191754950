// SPDX-License-Identifier: BSD-3-Clause
//
// The CUDA kernels as the rest of the extension sees them: the structs of params.h with device
// pointers (the structs themselves and the list of blocks lie on the host) and a stream. Launchers
// never allocate and never wait: what they need beside the tensors is the workspace.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace ring_attention::cuda {

// What tiles are chosen by.
struct Device {
  int sm_count = 0;
  int smem_optin_bytes = 0;  // shared memory one block may ask for
  bool hopper = false;       // it is for the kernels of sm90
};

// Asked once per device and kept.
Device device_of(int ordinal);

// Bytes of the workspace of a call, 16-byte aligned, from the shapes and the device only; 0: none,
// and null will do. Nothing is kept in it between calls.
int64_t forward_workspace_bytes(const ForwardParams& params, const Device& device);
int64_t backward_workspace_bytes(const BackwardParams& params, const Device& device);

// Notes [state] and [intervals] of params.h hold to the letter. float64 is cudaErrorNotSupported.
// Rows of 16-bit q, k, v and dout lie on 16 bytes (address and outer strides), acc and gradients on
// 8, else it is cudaErrorMisalignedAddress; out may have rows anywhere.
cudaError_t forward(const ForwardParams& params, void* workspace, const Device& device,
                    cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, void* workspace, const Device& device,
                     cudaStream_t stream);

// (acc, m, l) += (other_acc, other_m, other_l): joins two float32 states of the same rows. acc
// [rows, v_head_dim], m and l [rows], all contiguous.
cudaError_t combine(int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
                    const void* other_acc, const void* other_m, const void* other_l,
                    cudaStream_t stream);

// (out, lse) from (acc, m, l), the last step of a forward.
cudaError_t finish(const ForwardParams& params, cudaStream_t stream);

// See DeltaParams.
cudaError_t delta(const DeltaParams& params, cudaStream_t stream);

// dsinks[h] = -sum over batch and queries of exp(sinks[h] - lse) delta. lse and delta [batch,
// heads, q_len], contiguous; sinks and dsinks [heads].
cudaError_t sink_gradient(const float* sinks, const float* lse, const float* delta, float* dsinks,
                          int64_t batch, int64_t heads, int64_t q_len, cudaStream_t stream);

}  // namespace ring_attention::cuda
