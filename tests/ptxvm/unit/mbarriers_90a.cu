// SPDX-License-Identifier: BSD-3-Clause
//
// Tiles that pass through queues of mbarriers, as csrc/cuda/tile_queue.cuh has them: one warpgroup
// loads, two read, by wgmma or by ordinary loads. Right, and with one mistake each: the report it
// must cause, whatever the schedule.
#include <cstring>

#include "cases.h"

namespace {

using unit::Buffer;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void init(const uint64_t& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
               : "memory");
}
__device__ void arrive(const uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
__device__ bool try_wait(const uint64_t& barrier, int parity) {
  int ended;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; "
      "}"
      : "=r"(ended)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}
__device__ void wait(const uint64_t& barrier, int parity) {
  asm volatile(
      "{\n.reg .pred ended;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}
__device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

enum class Lacks {
  kNothing,
  kNothingReadersFence,
  kNothingOneLaneWaits,
  kFree,       // the tile is released before it is read
  kPublished,  // and published before it is written
  kWait,
  kLoop,       // try_wait is taken for a wait
  kWaitOfAll,  // one lane waits, without __syncwarp
  kProxyFence,
  kReadParity,  // the readers'
  kFreeParity,  // the loaders'
  kArrivals,    // one more is counted
  kCount,       // all lanes release
  kOneArrival,  // one releases once more at the end
  kOneInit,     // of two
  kBarrier,     // after the initialisation
  kInitOnce,
  kOrdinaryStore,
  kOrdinaryLoad,
  kRegisters,
  kRegistersOfAll,
  kSameRegisters,
  kSyncwarp,  // ordinary loads are released by one lane
  kRelease,   // a warp waits and lets nobody know
};

constexpr int kStages = 2, kTiles = 12, kReaders = 256, kLoaders = 64, kThreads = 384;

struct Queue {
  uint64_t loaded[kStages], read[kStages];
};

template <Lacks kLacks>
__device__ void begin(Queue& queue) {
  const int stage = threadIdx.x;
  if (stage < kStages) {
    init(queue.loaded[stage], kLoaders + (kLacks == Lacks::kArrivals));
    if (kLacks != Lacks::kOneInit || stage == 0)
      init(queue.read[stage], kReaders / 32 - (kLacks == Lacks::kRelease));
    if (kLacks == Lacks::kInitOnce) init(queue.read[stage], kReaders / 32);
  }
  if (kLacks != Lacks::kBarrier) __syncthreads();
}

template <Lacks kLacks>
__device__ void give_up_registers() {
  const int warp = threadIdx.x / 32;
  if (kLacks == Lacks::kRegistersOfAll && warp == 9) return;
  if (kLacks == Lacks::kSameRegisters && warp == 10) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  }
}
template <Lacks kLacks>
__device__ void take_registers() {
  if (kLacks == Lacks::kRegisters) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  }
}

// All tiles of 64 words, each thread one of them.
template <Lacks kLacks>
__device__ void load_tiles(Queue& queue, uint32_t (&stages)[kStages][64], const uint32_t* tiles) {
  const int thread = threadIdx.x - kReaders;
  for (int t = 0; t < kTiles; ++t) {
    const int slot = t % kStages, parity = t / kStages % 2;
    wait(queue.read[slot], kLacks == Lacks::kFreeParity ? parity : parity ^ 1);
    if (kLacks == Lacks::kOrdinaryStore && t == 3) queue.read[1] = 0;
    if (kLacks == Lacks::kPublished) arrive(queue.loaded[slot]);
    stages[slot][thread] = tiles[t * 64 + thread];
    if (kLacks != Lacks::kProxyFence && kLacks != Lacks::kNothingReadersFence) fence_proxy();
    if (kLacks != Lacks::kPublished) arrive(queue.loaded[slot]);
  }
}

template <Lacks kLacks>
__device__ void wait_for_tile(Queue& queue, int slot, int parity) {
  const bool first = threadIdx.x % 32 == 0;
  if (kLacks == Lacks::kLoop) {
    try_wait(queue.loaded[slot], parity);
  } else if (kLacks == Lacks::kNothingOneLaneWaits || kLacks == Lacks::kWaitOfAll) {
    if (first) wait(queue.loaded[slot], parity);
    if (kLacks == Lacks::kNothingOneLaneWaits) __syncwarp();
  } else if (kLacks != Lacks::kWait) {
    wait(queue.loaded[slot], kLacks == Lacks::kReadParity ? parity ^ 1 : parity);
  }
  if (kLacks == Lacks::kNothingReadersFence) fence_proxy();
}

template <Lacks kLacks>
__device__ void release(Queue& queue, int slot) {
  if (threadIdx.x % 32 == 0 || kLacks == Lacks::kCount) arrive(queue.read[slot]);
}

// out[thread][4] += 1 b, where a tile is b [16, 8], K-major: two times 8 rows of 16 bytes.
template <Lacks kLacks>
__global__ void __launch_bounds__(kThreads, 1) columns(const uint32_t* tiles, float* out) {
  __shared__ __align__(128) uint32_t stages[kStages][64];
  __shared__ Queue queue;
  begin<kLacks>(queue);
  if (threadIdx.x >= kReaders) {
    give_up_registers<kLacks>();
    if (threadIdx.x < kReaders + kLoaders) load_tiles<kLacks>(queue, stages, tiles);
    return;
  }
  if (kLacks != Lacks::kRegistersOfAll) take_registers<kLacks>();
  float d[4] = {};
  for (int t = 0; t < kTiles; ++t) {
    const int slot = t % kStages, parity = t / kStages % 2;
    wait_for_tile<kLacks>(queue, slot, parity);
    if (kLacks == Lacks::kFree) release<kLacks>(queue, slot);
    if (kLacks == Lacks::kOrdinaryLoad && t == 3) d[0] += float(queue.loaded[1] & 1);
    const uint64_t b =
        uint64_t{shared_address(stages[slot])} >> 4 | uint64_t{8} << 16 | uint64_t{8} << 32;
    asm volatile(
        "wgmma.fence.sync.aligned;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %4, %4, %4}, "
        "%5, 1, 1, 1, 0;\n"
        "wgmma.commit_group.sync.aligned;\n"
        "wgmma.wait_group.sync.aligned 0;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(0x3f803f80), "l"(b)
        : "memory");
    if (kLacks != Lacks::kFree) release<kLacks>(queue, slot);
  }
  if (kLacks == Lacks::kOneArrival && threadIdx.x == 64) arrive(queue.read[0]);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

// out[thread] = sum of the tiles' words at thread % 64.
template <Lacks kLacks>
__global__ void __launch_bounds__(kThreads, 1) words(const uint32_t* tiles, uint32_t* out) {
  __shared__ uint32_t stages[kStages][64];
  __shared__ Queue queue;
  begin<kLacks>(queue);
  if (threadIdx.x >= kReaders) {
    if (threadIdx.x < kReaders + kLoaders) load_tiles<kLacks>(queue, stages, tiles);
    return;
  }
  uint32_t sum = 0;
  const bool spectator = kLacks == Lacks::kRelease && threadIdx.x / 32 == 3;
  for (int t = 0; t < kTiles; ++t) {
    const int slot = t % kStages;
    wait_for_tile<kLacks>(queue, slot, t / kStages % 2);
    if (spectator) continue;
    sum += stages[slot][threadIdx.x % 64];
    if (kLacks != Lacks::kSyncwarp) __syncwarp();
    release<kLacks>(queue, slot);
  }
  out[threadIdx.x] = sum;
}

int value_of(int tile, int n, int k) { return (tile * 7 + n * 5 + k * 3 + n * k) % 5 - 2; }

std::vector<uint32_t> tile_words() {
  std::vector<uint32_t> result(kTiles * 64);
  for (int i = 0; i < int(result.size()); ++i) {
    const int tile = i / 64, n = i % 32 / 4, k = i % 64 / 32 * 8 + i % 4 * 2;
    const auto bits = [&](int one) {
      const float value = float(value_of(tile, n, one));
      uint32_t whole;
      std::memcpy(&whole, &value, 4);
      return whole >> 16;
    };
    result[i] = bits(k) | bits(k + 1) << 16;
  }
  return result;
}

template <Lacks kLacks>
void run_columns() {
  Buffer<uint32_t> tiles(tile_words());
  Buffer<float> out(kReaders * 4);
  columns<kLacks><<<1, kThreads>>>(tiles.data(), out.data());
  if (cudaGetLastError() != cudaSuccess) return;
  const std::vector<float> got = out.values();
  for (int i = 0; i < int(got.size()); ++i) {
    const int n = i / 4 % 4 * 2 + i % 2;
    int expected = 0;
    for (int k = 0; k < 16 * kTiles; ++k) expected += value_of(k / 16, n, k % 16);
    unit::expect_equal(got[i], float(expected), "entry " + std::to_string(i));
  }
}

template <Lacks kLacks>
void run_words() {
  const std::vector<uint32_t> in = tile_words();
  Buffer<uint32_t> tiles(in), out(kReaders);
  words<kLacks><<<1, kThreads>>>(tiles.data(), out.data());
  if (cudaGetLastError() != cudaSuccess) return;
  const std::vector<uint32_t> got = out.values();
  for (int i = 0; i < int(got.size()); ++i) {
    uint32_t expected = 0;
    for (int t = 0; t < kTiles; ++t) expected += in[t * 64 + i % 64];
    unit::expect_equal(got[i], expected, "thread " + std::to_string(i));
  }
}

CASE(mbarrier_queue) { run_columns<Lacks::kNothing>(); }
CASE(mbarrier_queue_of_ordinary_loads) { run_words<Lacks::kNothing>(); }
CASE(mbarrier_readers_fence_proxies) { run_columns<Lacks::kNothingReadersFence>(); }
CASE(mbarrier_one_lane_waits) { run_columns<Lacks::kNothingOneLaneWaits>(); }
BUG(mbarrier_released_before_the_read, "race in shared memory: ") { run_columns<Lacks::kFree>(); }
BUG(mbarrier_published_before_the_write, "shared memory: wgmma of") {
  run_columns<Lacks::kPublished>();
}
BUG(mbarrier_without_a_wait, "shared memory: wgmma of") { run_columns<Lacks::kWait>(); }
// Which of these comes first is a matter of the schedule.
BUG(mbarrier_try_wait_once, "shared memory: wgmma of|one has not waited") {
  run_columns<Lacks::kLoop>();
}
BUG(mbarrier_one_lane_waits_without_syncwarp, "shared memory: load of") {
  run_words<Lacks::kWaitOfAll>();
}
BUG(mbarrier_without_a_proxy_fence, "race of proxies") { run_columns<Lacks::kProxyFence>(); }
BUG(mbarrier_wrong_parity, "shared memory: wgmma of|deadlock: waits for phase") {
  run_columns<Lacks::kReadParity>();
}
BUG(mbarrier_wrong_parity_of_the_loaders, "deadlock: waits for phase") {
  run_columns<Lacks::kFreeParity>();
}
BUG(mbarrier_too_few_arrivals, "deadlock: waits for phase") { run_columns<Lacks::kArrivals>(); }
BUG(mbarrier_all_lanes_arrive, "more arrive than the 8 it counts") { run_columns<Lacks::kCount>(); }
BUG(mbarrier_one_arrives_again, "more arrive than the 8 it counts") {
  run_columns<Lacks::kOneArrival>();
}
BUG(mbarrier_not_initialised, "not initialised") { run_columns<Lacks::kOneInit>(); }
BUG(mbarrier_without_a_barrier_after_init, "initialised") { run_columns<Lacks::kBarrier>(); }
BUG(mbarrier_initialised_twice, "mbarrier.init of an mbarrier") { run_columns<Lacks::kInitOnce>(); }
BUG(mbarrier_overwritten, "shared memory: store over an mbarrier") {
  run_columns<Lacks::kOrdinaryStore>();
}
BUG(mbarrier_loaded, "shared memory: load of an mbarrier") { run_columns<Lacks::kOrdinaryLoad>(); }
BUG(mbarrier_released_by_one_lane_without_syncwarp, "race in shared memory: ") {
  run_words<Lacks::kSyncwarp>();
}
BUG(mbarrier_waits_and_lets_nobody_know, "may still wait") { run_words<Lacks::kRelease>(); }
BUG(setmaxnreg_more_than_there_are, "deadlock: waits for registers") {
  run_columns<Lacks::kRegisters>();
}
BUG(setmaxnreg_by_three_warps, "setmaxnreg: not executed by all four warps") {
  run_columns<Lacks::kRegistersOfAll>();
}
BUG(setmaxnreg_of_two_numbers, "setmaxnreg: another warp") { run_columns<Lacks::kSameRegisters>(); }

}  // namespace
