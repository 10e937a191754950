// SPDX-License-Identifier: BSD-3-Clause
#include "forward.cuh"

namespace ring_attention::cuda::sm80 {

template cudaError_t launch_forward<BFloat16, HeadDims<192, 192>>(const ForwardCall&, TileFor,
                                                                  cudaStream_t);

}  // namespace ring_attention::cuda::sm80
