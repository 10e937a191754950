// SPDX-License-Identifier: BSD-3-Clause
#include "backward_launch.cuh"

namespace ring_attention::cuda::sm90 {

template cudaError_t launch_backward<Float16, HeadDims<192, 192>>(const BackwardCall&,
                                                                  cudaStream_t);

}  // namespace ring_attention::cuda::sm90
