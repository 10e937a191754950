// SPDX-License-Identifier: BSD-3-Clause
//
// Barriers in shared memory (mbarrier) that count arrivals in phases: how the warps that load tiles
// and those that multiply them tell each other so. And how registers move between them on Hopper.
#pragma once

#include "ptx.cuh"

namespace ring_attention::cuda {

// A phase ends with its `count`-th arrival.
RA_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}
RA_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Until the phase in hand, whose number is even (0) or odd (1), has ended. Of a barrier that nobody
// has arrived at, phase 1 counts as ended.
RA_DEVICE void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred ended;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Of a part of the block, a multiple of 32 threads. Number 0 is __syncthreads().
RA_DEVICE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// The registers that each thread of a warpgroup has from here on.
template <int kCount>
RA_DEVICE void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
RA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

}  // namespace ring_attention::cuda
