// SPDX-License-Identifier: BSD-3-Clause
#include "forward_fp32.cuh"

namespace ring_attention::cuda::sm80 {

template cudaError_t launch_forward_fp32<64>(const ForwardCall&, cudaStream_t);

}  // namespace ring_attention::cuda::sm80
