// SPDX-License-Identifier: BSD-3-Clause
//
// FlashAttention-2's forward kernels for head dim 64: causal ones for bf16, full ones for fp16.
#include <flash_fwd_launch_template.h>

namespace flash {

template <>
void run_mha_fwd_<cutlass::bfloat16_t, 64, true>(Flash_fwd_params& params, cudaStream_t stream) {
  run_mha_fwd_hdim64<cutlass::bfloat16_t, true>(params, stream);
}

template <>
void run_mha_fwd_<cutlass::half_t, 64, false>(Flash_fwd_params& params, cudaStream_t stream) {
  run_mha_fwd_hdim64<cutlass::half_t, false>(params, stream);
}

}  // namespace flash
