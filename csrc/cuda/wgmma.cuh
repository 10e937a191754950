// SPDX-License-Identifier: BSD-3-Clause
//
// Hopper's products of matrices, as ptx.cuh has the instructions before: one inline function each,
// for machine code of sm_90a alone. Four warps multiply 64 rows by a matrix in shared memory while
// they go on: a product's registers (sums, and A where it is in registers) are not touched between
// its start and a wait.
//
//   wgmma_fence();  start one or several products;  wgmma_commit();  ...;  wgmma_wait<0>();
#pragma once

#include "elements.cuh"

namespace ring_attention::cuda {

// Before the first product after registers of it were written otherwise.
RA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
RA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most kPending groups are still under way.
template <int kPending>
RA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Products read shared memory past the caches' ordinary order: what threads wrote there, by stores
// or by copies that have arrived, they see after this and a barrier.
RA_DEVICE void fence_before_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// The compiler keeps registers of products where they are: what came before stays before.
template <int kCount>
RA_DEVICE void hold(float (&sums)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[i][e])::"memory");
  }
}
template <int kCount>
RA_DEVICE void hold(uint32_t (&rows)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(rows[i][e])::"memory");
  }
}

// sums[64 x kColumns] = or += a[64 x 16] b[16 x kColumns]. A warp's sums are fragments of m16n8,
// kColumns / 8 of its 16 rows. b, and a where it is not in registers, are descriptors.
// start_rows(): b is rows of B^T, in shared memory as a is. add_columns(): rows of B.
template <typename Elem, int kColumns>
struct Wgmma;

#define RA_TEN(t)                                                                        \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t \
  "8, "                                                                                  \
  "%" #t "9"
#define RA_UNITS "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define RA_SUM(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define RA_SUMS_4(i) RA_SUM(i), RA_SUM(i + 1), RA_SUM(i + 2), RA_SUM(i + 3)
#define RA_SUMS_8(i) RA_SUMS_4(i), RA_SUMS_4(i + 4)

// n: kColumns; all: the registers of the sums; r0 ...: the operands after those.
#define RA_WGMMA(Elem, type, n, all, r0, r1, r2, r3, r4, ...)                                     \
  template <>                                                                                     \
  struct Wgmma<Elem, n> {                                                                         \
    static RA_DEVICE void start_rows(float (&sums)[n / 8][4], uint64_t a, uint64_t b, bool add) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " r2                                     \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" all       \
                   "}, " r0 ", " r1 ", add, 1, 1, 0, 0;\n}\n"                                     \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                 \
    }                                                                                             \
    static RA_DEVICE void add_columns(float (&sums)[n / 8][4], const uint32_t (&a)[4],            \
                                      uint64_t b) {                                               \
      asm volatile(                                                                               \
          "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                          \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" all "}, {" r0      \
          ", " r1 ", " r2 ", " r3 "}, " r4 ", add, 1, 1, 1;\n}\n"                                 \
          : __VA_ARGS__                                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
    }                                                                                             \
  };
#define RA_WGMMA_OF_BOTH(...)             \
  RA_WGMMA(BFloat16, "bf16", __VA_ARGS__) \
  RA_WGMMA(Float16, "f16", __VA_ARGS__)

RA_WGMMA_OF_BOTH(32, RA_UNITS ", %10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19", "%20",
                 RA_SUMS_4(0))
RA_WGMMA_OF_BOTH(64, RA_UNITS ", " RA_TEN(1) ", " RA_TEN(2) ", %30, %31", "%32", "%33", "%34",
                 "%35", "%36", RA_SUMS_8(0))
RA_WGMMA_OF_BOTH(80, RA_UNITS ", " RA_TEN(1) ", " RA_TEN(2) ", " RA_TEN(3), "%40", "%41", "%42",
                 "%43", "%44", RA_SUMS_8(0), RA_SUM(8), RA_SUM(9))
RA_WGMMA_OF_BOTH(96, RA_UNITS ", " RA_TEN(1) ", " RA_TEN(2) ", " RA_TEN(3) ", %40, %41, %42, %43, "
                 "%44, %45, %46, %47", "%48", "%49", "%50", "%51", "%52", RA_SUMS_8(0),
                 RA_SUMS_4(8))
RA_WGMMA_OF_BOTH(128,
                 RA_UNITS ", " RA_TEN(1) ", " RA_TEN(2) ", " RA_TEN(3) ", " RA_TEN(4) ", " RA_TEN(
                     5) ", %60, %61, %62, %63",
                 "%64", "%65", "%66", "%67", "%68", RA_SUMS_8(0), RA_SUMS_8(8))

#undef RA_WGMMA_OF_BOTH
#undef RA_WGMMA
#undef RA_SUMS_8
#undef RA_SUMS_4
#undef RA_SUM
#undef RA_UNITS
#undef RA_TEN

// sums[64 x kDim] += a[64 x 16] b[16 x kDim], b rows of a tile of Layout from `row` on.
// In pieces that are a part of the registers each.
template <typename Elem, typename Layout, int kDim>
RA_DEVICE void add_columns(float (&sums)[kDim / 8][4], const uint32_t (&a)[4], uint64_t tile,
                           int row) {
  constexpr int kColumns = kDim % 128 == 0 ? 128 : kDim <= 96 ? kDim : 64;
  using Columns = float[kColumns / 8][4];
#pragma unroll
  for (int d = 0; d < kDim; d += kColumns) {
    Wgmma<Elem, kColumns>::add_columns(reinterpret_cast<Columns&>(sums[d / 8]), a,
                                       tile + Layout::step(row, d));
  }
}

}  // namespace ring_attention::cuda
