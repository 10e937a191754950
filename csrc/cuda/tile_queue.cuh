// SPDX-License-Identifier: BSD-3-Clause
//
// Tiles on their way from warps that load them to warps that multiply them, in shared memory: a
// ring of kStages slots, each with a barrier that ends a phase when a tile is there (every loading
// thread has arrived) and one that does when it has been read (every reading warp has). Both sides
// take the slots in turn, and each keeps its own count of them.
#pragma once

#include "barriers.cuh"
#include "wgmma.cuh"

namespace ring_attention::cuda {

template <int kStages>
struct QueueBarriers {
  uint64_t loaded[kStages], read[kStages];

  RA_DEVICE void init(int stage, int loaders, int reading_warps) {
    mbarrier_init(shared_address(&loaded[stage]), loaders);
    mbarrier_init(shared_address(&read[stage]), reading_warps);
  }
};

template <int kStages, int kTileBytes>
class TileQueue {
 public:
  RA_DEVICE TileQueue(const void* tiles, const QueueBarriers<kStages>& barriers)
      : tiles_(shared_address(tiles)), barriers_(shared_address(&barriers)) {}

  RA_DEVICE int slot() const { return slot_; }
  RA_DEVICE uint32_t tile() const { return tiles_ + slot_ * kTileBytes; }

  // ---- The loading side: wait_until_free(); write tile(); publish().

  RA_DEVICE void wait_until_free() const { mbarrier_wait(read(), parity_ ^ 1); }
  // What this thread wrote has arrived: for products, too.
  RA_DEVICE void publish() {
    fence_before_wgmma();
    mbarrier_arrive(loaded());
    advance();
  }

  // ---- The reading side: wait(); read tile(); release(), when this warp's products are over.

  RA_DEVICE void wait() const {
    mbarrier_wait(loaded(), parity_);
    __syncwarp();  // what a lane has seen, all have
  }
  RA_DEVICE void wait_for_next() const {
    TileQueue next = *this;
    next.advance();
    next.wait();
  }
  RA_DEVICE void release() {
    __syncwarp();  // all of its lanes are done
    if (threadIdx.x % 32 == 0) mbarrier_arrive(read());
    advance();
  }

 private:
  RA_DEVICE uint32_t loaded() const { return barriers_ + slot_ * 8; }
  RA_DEVICE uint32_t read() const { return barriers_ + (kStages + slot_) * 8; }
  RA_DEVICE void advance() {
    const bool last = slot_ + 1 == kStages;
    slot_ = last ? 0 : slot_ + 1;
    parity_ ^= last;
  }

  uint32_t tiles_, barriers_;
  int slot_ = 0, parity_ = 0;  // of the round in hand
};

}  // namespace ring_attention::cuda
