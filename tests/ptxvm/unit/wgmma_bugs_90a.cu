// SPDX-License-Identifier: BSD-3-Clause
//
// A kernel that multiplies by wgmma as attention does, right and with one mistake each: the report
// it must cause, whatever the schedule.
#include <cuda_bf16.h>

#include <cstring>

#include "cases.h"

namespace {

using unit::Buffer;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define D16(d)                                                                                    \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15])
#define D16_NAMES "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"

// d [64, 32] = a b^T, or added to d; both K-major.
__device__ void multiply(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " D16_NAMES
      ", %16, %17, p, 1, 1, 0, 0; }"
      : D16(d)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d [64, 32] += a b, a in registers, b N-major.
__device__ void multiply(float (&d)[16], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " D16_NAMES
               ", {%16, %17, %18, %19}, %20, 1, 1, 1, 1;"
               : D16(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The first 8 columns of d alone.
__device__ void multiply_narrow(float (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
}

// Keeps what the registers hold from being computed elsewhere.
template <typename T, int kCount>
__device__ void settle(T (&registers)[kCount]) {
  for (T& one : registers) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(one)::"memory");
    else
      asm volatile("" : "+r"(one)::"memory");
  }
}

enum class Lacks {
  kNothing,
  kNothingFenceAfterBarrier,
  kFirstFence,
  kFenceAfterWrite,
  kProxyFence,
  kProxyFenceOfAll,
  kProxyFenceAfterWait,
  kBarrierBefore,
  kBarrierAfter,
  kWait,
  kWaitOfFragment,
  kWaitOfAccumulator,
  kCommit,
  kWaitBeforeCopy,
  kLastWait,
  kFourthWarp,
  kSameDescriptor,
  kSameOrder,
  kSameWait,
  kSameScale,
  kSameShape,
  kSwizzle,
  kBaseOffset,
  kAlignment,
  kWidth,
  kBounds,
  kPlainBits,
  kCompleteGroup,
};

// S = Q K^T, P = bf16(S), O += P K, for tiles of 32 keys. Q [64, 64] per warpgroup, K [tiles, 32,
// 64], O [64, 32]; rows of 128 bytes, swizzled.
template <Lacks kLacks>
__global__ void attention(const uint4* q, const uint4* k, float* out, int tiles) {
  __shared__ __align__(1024) uint4 stage[2][32 * 8];
  __shared__ __align__(1024) uint4 queries[2][64 * 8];
  const int thread = threadIdx.x % 128, group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  const auto load_tile = [&](int t) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(&stage[t % 2][i / 8 * 8 + (i % 8 ^ i / 8 % 8)])),
                   "l"(k + t * 256 + i)
                   : "memory");
  };
  const auto fence_proxies = [&] {
    if (kLacks != Lacks::kProxyFenceOfAll || thread == 0) fence_proxy();
  };
  for (int i = thread; i < 512; i += 128)
    queries[group][i / 8 * 8 + (kLacks == Lacks::kSwizzle ? i % 8 : i % 8 ^ i / 8 % 8)] =
        q[group * 512 + i];
  const auto descriptor = [](const void* from) {
    return uint64_t{shared_address(from)} >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  };
  uint64_t q_rows = descriptor(queries[group]);
  if (kLacks == Lacks::kSameDescriptor) q_rows += uint64_t(warp == 2) << 16;
  if (kLacks == Lacks::kBaseOffset) q_rows |= uint64_t{1} << 49;
  if (kLacks == Lacks::kPlainBits) q_rows |= uint64_t{1} << 46;
  if (kLacks == Lacks::kAlignment) q_rows += 128 >> 4;
  if (kLacks == Lacks::kWidth) q_rows += 112 >> 4;
  if (kLacks == Lacks::kBounds) q_rows += uint64_t{4096} << 28;

  float s[16], o[16];
  uint32_t p[8];
  for (float& one : o) one = 0;
  load_tile(0);
  asm volatile("cp.async.commit_group;");
  if (kLacks == Lacks::kProxyFenceAfterWait) fence_proxies();
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) load_tile(t + 1);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (kLacks != Lacks::kProxyFence && kLacks != Lacks::kProxyFenceAfterWait &&
        kLacks != Lacks::kNothingFenceAfterBarrier)
      fence_proxies();
    if (kLacks != Lacks::kBarrierBefore) __syncthreads();
    if (kLacks == Lacks::kNothingFenceAfterBarrier) fence_proxies();
    if (kLacks == Lacks::kFourthWarp && warp == 3) {
      __syncthreads();
      continue;
    }
    const uint64_t keys = descriptor(stage[t % 2]);
    settle(o);
    if (kLacks != Lacks::kFirstFence) fence();
    if (kLacks == Lacks::kSameOrder && warp == 1) fence();
    for (int i = 0; i < 4; ++i) {
      multiply(s, q_rows + i * 2, keys + i * 2,
               kLacks == Lacks::kSameScale ? i != 0 || warp == 0 : i != 0);
    }
    if (kLacks == Lacks::kSameShape) multiply_narrow(s, q_rows, keys);
    if (kLacks != Lacks::kCommit) commit();
    if (kLacks == Lacks::kCompleteGroup) wait<1>();
    if (kLacks != Lacks::kWait && kLacks != Lacks::kCompleteGroup) wait<0>();
    for (int i = 0; i < 8; ++i)
      asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(p[i]) : "f"(s[2 * i + 1]), "f"(s[2 * i]));
    settle(p);
    if (kLacks != Lacks::kFenceAfterWrite) fence();
    for (int i = 0; i < 2; ++i) multiply(o, p + 4 * i, keys + i * 128);
    commit();
    if (kLacks == Lacks::kWaitOfFragment) asm volatile("mov.b32 %0, 7;" : "+r"(p[5]));
    if (kLacks == Lacks::kWaitOfAccumulator)
      asm volatile("add.f32 %0, %0, 0f3F800000;" : "+f"(o[3]));
    if (kLacks == Lacks::kWaitBeforeCopy) {
      __syncthreads();
      load_tile(t);
    }
    if (kLacks == Lacks::kSameWait && warp == t) wait<0>();
    if (kLacks != Lacks::kLastWait || t + 1 < tiles) wait<0>();
    settle(o);
    if (kLacks == Lacks::kWaitOfFragment) settle(p);
    if (kLacks != Lacks::kBarrierAfter) __syncthreads();
  }
  for (int i = 0; i < 16 && kLacks != Lacks::kLastWait; ++i)
    out[i * blockDim.x + threadIdx.x] = o[i];
}

int value_of_q(int row, int i) { return (row * 5 + i * 7 + row * i) % 3 - 1; }
int value_of_k(int row, int i) { return (row * 11 + i * 3 + row * row * i) % 3 - 1; }

constexpr int kTiles = 4;

template <auto kKernel>
void run_attention(int groups = 2, int shared_bytes = 0) {
  std::vector<uint16_t> q(2 * 64 * 64), k(kTiles * 32 * 64);
  const auto bits = [](int value) {
    const float real = float(value);
    uint32_t result;
    std::memcpy(&result, &real, 4);
    return uint16_t(result >> 16);
  };
  for (int i = 0; i < int(q.size()); ++i) q[i] = bits(value_of_q(i / 64, i % 64));
  for (int i = 0; i < int(k.size()); ++i) k[i] = bits(value_of_k(i / 64, i % 64));
  Buffer<uint16_t> dq(q), dk(k);
  Buffer<float> out(16 * 128 * groups);
  kKernel<<<1, 128 * groups, shared_bytes>>>(
      reinterpret_cast<uint4*>(dq.data()), reinterpret_cast<uint4*>(dk.data()), out.data(), kTiles);
  if (cudaGetLastError() != cudaSuccess) return;
  const std::vector<float> got = out.values();
  for (int row = 0; row < 64 * groups; ++row) {
    int expected[32] = {};
    for (int key = 0; key < kTiles * 32; ++key) {
      int s = 0;
      for (int i = 0; i < 64; ++i) s += value_of_q(row, i) * value_of_k(key, i);
      for (int n = 0; n < 32; ++n) expected[n] += s * value_of_k(key, n);
    }
    for (int n = 0; n < 32; ++n) {
      const int thread = row / 16 * 32 + row % 8 * 4 + n % 8 / 2;
      const int index = n / 8 * 4 + row / 8 % 2 * 2 + n % 2;
      unit::expect_equal(got[index * 128 * groups + thread], float(expected[n]),
                         "row " + std::to_string(row) + ", column " + std::to_string(n));
    }
  }
}

CASE(wgmma_attention) { run_attention<attention<Lacks::kNothing>>(); }
CASE(wgmma_proxy_fence_after_the_barrier) {
  run_attention<attention<Lacks::kNothingFenceAfterBarrier>>();
}
BUG(wgmma_without_a_first_fence, "written since the last wgmma.fence") {
  run_attention<attention<Lacks::kFirstFence>>();
}
BUG(wgmma_fragment_without_a_fence, "written since the last wgmma.fence") {
  run_attention<attention<Lacks::kFenceAfterWrite>>();
}
BUG(wgmma_without_a_proxy_fence, "race of proxies") {
  run_attention<attention<Lacks::kProxyFence>>();
}
BUG(wgmma_proxy_fence_by_one_lane, "race of proxies") {
  run_attention<attention<Lacks::kProxyFenceOfAll>>();
}
BUG(wgmma_proxy_fence_before_the_copies_wait, "race of proxies") {
  run_attention<attention<Lacks::kProxyFenceAfterWait>>();
}
BUG(wgmma_without_a_barrier_before, "shared memory: wgmma of") {
  run_attention<attention<Lacks::kBarrierBefore>>();
}
BUG(wgmma_without_a_barrier_after, "race in shared memory: ") {
  run_attention<attention<Lacks::kBarrierAfter>>();
}
BUG(wgmma_without_a_wait, "which is D of a wgmma in flight") {
  run_attention<attention<Lacks::kWait>>();
}
BUG(wgmma_wait_leaves_one_group, "which is D of a wgmma in flight") {
  run_attention<attention<Lacks::kCompleteGroup>>();
}
BUG(wgmma_without_a_commit, "which is D of a wgmma in flight") {
  run_attention<attention<Lacks::kCommit>>();
}
BUG(wgmma_fragment_written_in_flight, "which is A of a wgmma in flight") {
  run_attention<attention<Lacks::kWaitOfFragment>>();
}
BUG(wgmma_accumulator_written_in_flight, "which is D of a wgmma in flight") {
  run_attention<attention<Lacks::kWaitOfAccumulator>>();
}
BUG(wgmma_operand_overwritten_in_flight, "a wgmma in flight may still read") {
  run_attention<attention<Lacks::kWaitBeforeCopy>>();
}
BUG(exit_with_wgmma_in_flight, "exit with a wgmma not waited for") {
  run_attention<attention<Lacks::kLastWait>>();
}
BUG(wgmma_by_three_warps, "not executed by all four warps") {
  run_attention<attention<Lacks::kFourthWarp>>();
}
BUG(wgmma_wait_by_one_warp, "another warp of the warpgroup executed another one") {
  run_attention<attention<Lacks::kSameWait>>();
}
BUG(wgmma_descriptors_differ, "disagree on descriptors") {
  run_attention<attention<Lacks::kSameDescriptor>>();
}
BUG(wgmma_scales_differ, "disagree on descriptors or scale-d") {
  run_attention<attention<Lacks::kSameScale>>();
}
BUG(wgmma_order_differs, "executed another one") { run_attention<attention<Lacks::kSameOrder>>(); }
BUG(wgmma_of_two_shapes_in_flight, "of another shape") {
  run_attention<attention<Lacks::kSameShape>>();
}
BUG(wgmma_operand_not_swizzled, unit::kWrongValues) { run_attention<attention<Lacks::kSwizzle>>(); }
BUG(wgmma_base_offset, "base offset is not supported") {
  run_attention<attention<Lacks::kBaseOffset>>();
}
BUG(wgmma_descriptor_of_another_kind, "bits of a descriptor") {
  run_attention<attention<Lacks::kPlainBits>>();
}
BUG(wgmma_unaligned_pattern, "into the swizzle's pattern") {
  run_attention<attention<Lacks::kAlignment>>();
}
BUG(wgmma_past_the_width, "leaves the bytes of the swizzle's width") {
  run_attention<attention<Lacks::kWidth>>();
}
BUG(wgmma_past_the_end, "shared memory out of bounds") {
  run_attention<attention<Lacks::kBounds>>();
}

// The next tile's scores are in flight together with this tile's values, as in FlashAttention-3.
__global__ void overlapped(const uint4* q, const uint4* k, float* out, int tiles) {
  extern __shared__ __align__(1024) uint4 all[];
  uint4* queries = all + tiles * 256;
  for (int i = threadIdx.x; i < tiles * 256; i += 128) all[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = k[i];
  for (int i = threadIdx.x; i < 512; i += 128) queries[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = q[i];
  fence_proxy();
  __syncthreads();
  const auto descriptor = [](const void* from) {
    return uint64_t{shared_address(from)} >> 4 | uint64_t{64} << 32 | uint64_t{1} << 62;
  };
  const uint64_t q_rows = descriptor(queries);
  float s[16], o[16];
  uint32_t p[8];
  for (float& one : o) one = 0;
  settle(o);
  fence();
  for (int i = 0; i < 4; ++i) multiply(s, q_rows + i * 2, descriptor(all) + i * 2, i != 0);
  commit();
  wait<0>();
  for (int t = 0; t < tiles; ++t) {
    settle(s);
    for (int i = 0; i < 8; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(s[2 * i], s[2 * i + 1]);
      std::memcpy(&p[i], &pair, 4);
    }
    settle(p);
    settle(o);
    const uint64_t keys = descriptor(all + t * 256);
    if (t + 1 < tiles) {
      fence();
      for (int i = 0; i < 4; ++i) multiply(s, q_rows + i * 2, keys + 256 + i * 2, i != 0);
    }
    commit();
    fence();
    for (int i = 0; i < 2; ++i) multiply(o, p + 4 * i, keys + i * 128);
    commit();
    wait<1>();
    settle(s);
    for (float& one : s) one *= 2;
    wait<0>();
    settle(o);
    for (float& one : s) one *= 0.5f;
  }
  for (int i = 0; i < 16; ++i) out[i * 128 + threadIdx.x] = o[i];
}

CASE(wgmma_overlapped) { run_attention<overlapped>(1, (kTiles * 256 + 512) * 16); }

}  // namespace
