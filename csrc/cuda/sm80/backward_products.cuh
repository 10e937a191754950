// SPDX-License-Identifier: BSD-3-Clause
//
// The products of the backward kernels, for a warp's 16 rows. Sums lie in registers as
// mma.m16n8k16 leaves them, whatever the element type: of eight columns, a lane holds columns 2t
// and 2t + 1 of row g as [0] and [1], of row g + 8 as [2] and [3]; g = lane / 4, t = lane % 4.
//
// 16-bit elements are multiplied by tensor cores. float32 is multiplied by FFMA, whose peak is a
// sixteenth of theirs on an A100, from operands read again for every 16 rows: exact, and meant for
// tests and small models.
#pragma once

#include <type_traits>

#include "../shared_tile.cuh"

namespace ring_attention::cuda::sm80 {

// A row of floats lies in shared memory like one of twice as many 16-bit elements.
template <typename Elem, int kDim>
constexpr int kColumns = kDim * static_cast<int>(sizeof(Elem)) / 2;

template <int kDim>
RA_DEVICE float4 load_floats(uint32_t tile, int row, int chunk) {
  const uint4 x = load_shared_16(tile + TileLayout<2 * kDim>::offset(row, chunk));
  return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z),
                     __uint_as_float(x.w));
}

// Two neighbouring columns of a row.
template <int kDim>
RA_DEVICE float2 load_pair(uint32_t tile, int row, int column) {
  return load_shared_8(tile + TileLayout<2 * kDim>::offset(row, column / 4) + column % 4 * 4);
}

// sum = A B^T, A the warp's rows of one tile, B the rows of another.
template <typename Elem, int kDim, int kTiles>
RA_DEVICE void multiply(float (&sum)[kTiles][4], uint32_t a_tile, int first_row, uint32_t b_tile) {
#pragma unroll
  for (auto& tile : sum) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  if constexpr (std::is_same_v<Elem, Float32>) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int c = 0; c < kDim / 4; ++c) {
      const float4 a0 = load_floats<kDim>(a_tile, first_row + g, c);
      const float4 a1 = load_floats<kDim>(a_tile, first_row + g + 8, c);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = load_floats<kDim>(b_tile, 8 * j + 2 * t + e, c);
          sum[j][e] = fmaf(a0.x, b.x, sum[j][e]), sum[j][e + 2] = fmaf(a1.x, b.x, sum[j][e + 2]);
          sum[j][e] = fmaf(a0.y, b.y, sum[j][e]), sum[j][e + 2] = fmaf(a1.y, b.y, sum[j][e + 2]);
          sum[j][e] = fmaf(a0.z, b.z, sum[j][e]), sum[j][e + 2] = fmaf(a1.z, b.z, sum[j][e + 2]);
          sum[j][e] = fmaf(a0.w, b.w, sum[j][e]), sum[j][e + 2] = fmaf(a1.w, b.w, sum[j][e + 2]);
        }
      }
    }
  } else {
    const RowOperand<kDim> a(a_tile, first_row);
    const TransposedOperand<kDim> b(b_tile);
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t rows[4];
      a.load(rows, 0, d);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t columns[4];
        b.load(columns, 8 * j, d);
        Elem::mma(sum[j], rows, columns[0], columns[1]);
        Elem::mma(sum[j + 1], rows, columns[2], columns[3]);
      }
    }
  }
}

// Which columns of a warp's weights are not all zero: bit 2 j + e for column 8 j + 2 t + e.
template <int kTiles>
RA_DEVICE uint32_t columns_in_use(const float (&weights)[kTiles][4]) {
  uint32_t used = 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (weights[j][e] != 0.0f || weights[j][e + 2] != 0.0f) used |= 1u << (2 * j + e);
    }
  }
  used |= __shfl_xor_sync(kAllLanes, used, 4);
  used |= __shfl_xor_sync(kAllLanes, used, 8);
  used |= __shfl_xor_sync(kAllLanes, used, 16);
  return used;
}

// Two 16-bit elements, those kept whose bit is set.
RA_DEVICE uint32_t kept_pair(uint32_t pair, uint32_t bits) {
  return pair & ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u));
}

// sum += weights B. kSieve: where a column of the weights is all zero, the row of B that it meets
// counts as zeros, too: it may be garbage, and 0 NaN = NaN.
template <typename Elem, int kDim, bool kSieve, int kTiles>
RA_DEVICE void accumulate(float (&sum)[kDim / 8][4], const float (&weights)[kTiles][4],
                          uint32_t b_tile) {
  const int lane = threadIdx.x % 32;
  [[maybe_unused]] const uint32_t used = kSieve ? columns_in_use(weights) : 0;
  if constexpr (std::is_same_v<Elem, Float32>) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll 1
      for (int t = 0; t < 4; ++t) {
        // The lane of the same rows that has these two columns.
        const int owner = (lane & ~3) | t;
        const uint32_t bits = kSieve ? __shfl_sync(kAllLanes, used, owner) >> (2 * j) : 3;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if ((bits >> e & 1) == 0) continue;
          const float w0 = __shfl_sync(kAllLanes, weights[j][e], owner);
          const float w1 = __shfl_sync(kAllLanes, weights[j][e + 2], owner);
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            const float2 b = load_pair<kDim>(b_tile, 8 * j + 2 * t + e, 8 * d + lane % 4 * 2);
            sum[d][0] = fmaf(w0, b.x, sum[d][0]), sum[d][1] = fmaf(w0, b.y, sum[d][1]);
            sum[d][2] = fmaf(w1, b.x, sum[d][2]), sum[d][3] = fmaf(w1, b.y, sum[d][3]);
          }
        }
      }
    }
  } else {
    const ColumnOperand<kDim> b(b_tile);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const uint32_t rows[4] = {Elem::pack(weights[j][0], weights[j][1]),
                                Elem::pack(weights[j][2], weights[j][3]),
                                Elem::pack(weights[j + 1][0], weights[j + 1][1]),
                                Elem::pack(weights[j + 1][2], weights[j + 1][3])};
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t columns[4];
        b.load(columns, 8 * j, d);
        if constexpr (kSieve) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            columns[i] = kept_pair(columns[i], used >> (2 * (j + i % 2)));
          }
        }
        Elem::mma(sum[d / 8], rows, columns[0], columns[1]);
        Elem::mma(sum[d / 8 + 1], rows, columns[2], columns[3]);
      }
    }
  }
}

}  // namespace ring_attention::cuda::sm80
