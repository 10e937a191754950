// SPDX-License-Identifier: BSD-3-Clause
#include "backward_launch.cuh"

namespace ring_attention::cuda::sm80 {

template cudaError_t launch_backward<Float16, HeadDims<256, 256>>(const BackwardCall&, bool,
                                                                  cudaStream_t);

}  // namespace ring_attention::cuda::sm80
