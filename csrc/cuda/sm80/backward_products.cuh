// SPDX-License-Identifier: BSD-3-Clause
//
// The products of the backward kernels by tensor cores, for a warp's bands of 16 rows: what is read
// of B serves all of them. See Note [warps of a tile]. Sums lie in registers as mma.m16n8k16 leaves
// them: of a band and eight columns, a lane holds columns 2t and 2t + 1 of row g as [0] and [1], of
// row g + 8 as [2] and [3]; g = lane / 4, t = lane % 4.
#pragma once

#include "../shared_tile.cuh"
#include "backward_config.h"

namespace ring_attention::cuda::sm80 {

// A of the scores: a warp's rows of a tile that stays.
template <typename Plan, int kDim, typename Elem = typename Plan::Element>
class KeptRows {
 public:
  RA_DEVICE KeptRows(uint32_t tile, int first_row) : shared_(tile, first_row) {}

  // Once they have arrived.
  RA_DEVICE void keep() {
    if constexpr (Plan::kInRegisters) {
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
#pragma unroll
        for (int band = 0; band < Plan::kBands; ++band) {
          shared_.load(registers_[d / 16][band], 16 * band, d);
        }
      }
    }
  }
  RA_DEVICE void load(uint32_t (&a)[4], int band, int d) const {
    if constexpr (Plan::kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = registers_[d / 16][band][i];
    } else {
      shared_.load(a, 16 * band, d);
    }
  }

 private:
  RowOperand<kDim> shared_;
  uint32_t registers_[Plan::kInRegisters ? kDim / 16 : 1][Plan::kBands][4];
};

// first(j, e, r), of column 8 j + 2 t + e and row g + 8 r of a warp's.
template <int kBands, int kTiles, typename First>
RA_DEVICE void fill(float (&sum)[kBands][kTiles][4], const First& first) {
#pragma unroll
  for (int i = 0; i < kBands * kTiles * 4; ++i) {
    const int j = i / (4 * kBands), r = i / 2 % (2 * kBands), e = i % 2;
    sum[r / 2][j][e + r % 2 * 2] = first(j, e, r);
  }
}

// sum = first + A B^T, B eight rows per tile of the sum, from b_row on, of a tile that passes by.
template <typename Plan, int kDim, typename Elem, int kBands, int kTiles, typename First>
RA_DEVICE void multiply(float (&sum)[kBands][kTiles][4], const KeptRows<Plan, kDim, Elem>& a,
                        uint32_t b_tile, int b_row, const First& first) {
  static_assert(kTiles % 2 == 0);
  fill(sum, first);
  const TransposedOperand<kDim> b(b_tile, b_row);
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    uint32_t rows[kBands][4];
#pragma unroll
    for (int band = 0; band < kBands; ++band) a.load(rows[band], band, d);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t columns[4];
      b.load(columns, 8 * j, d);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        Elem::mma(sum[band][j], rows[band], columns[0], columns[1]);
        Elem::mma(sum[band][j + 1], rows[band], columns[2], columns[3]);
      }
    }
  }
}

// P or dS in shared memory, [rows][stream].
template <typename Plan, typename Elem = typename Plan::Element>
struct WeightTile {
  using Layout = TileLayout<Plan::kStream>;
  uint32_t tile;  // address

  RA_DEVICE void store(const float (&weights)[Plan::kBands][Plan::kScoreTiles][4],
                       const WarpPlace<Plan>& at) const {
    const int lane = threadIdx.x % 32;
    const uint32_t first =
        tile + Layout::offset(at.row + lane / 4, at.side * Plan::kScoreTiles) + lane % 4 * 4;
#pragma unroll
    for (int band = 0; band < Plan::kBands; ++band) {
#pragma unroll
      for (int j = 0; j < Plan::kScoreTiles; ++j) {
        const auto& x = weights[band][j];
        const uint32_t to = (first ^ j * 16) + 16 * band * Layout::kRowBytes;
        store_shared(to, Elem::pack(x[0], x[1]));
        store_shared(to + 8 * Layout::kRowBytes, Elem::pack(x[2], x[3]));
      }
    }
  }
};

// A of the sums: rows of the weights,
template <typename Plan>
struct WeightRows {
  RowOperand<Plan::kStream> rows;

  RA_DEVICE WeightRows(uint32_t tile, int first_row) : rows(tile, first_row) {}
  RA_DEVICE void load(uint32_t (&a)[4], int band, int k) const { rows.load(a, 16 * band, k); }
};

// or columns of them: A is the weights transposed.
template <typename Plan>
struct WeightColumns {
  using Layout = TileLayout<Plan::kStream>;
  uint32_t lane;  // address

  RA_DEVICE WeightColumns(uint32_t tile, int first_column) {
    const int l = threadIdx.x % 32;
    lane = tile + Layout::offset(l / 16 * 8 + l % 8, first_column / 8 + l / 8 % 2);
  }
  RA_DEVICE void load(uint32_t (&a)[4], int band, int k) const {
    ldmatrix_x4_trans(a, Layout::advance(lane, 2 * band) + k * Layout::kRowBytes);
  }
};

// Of two neighbouring 16-bit numbers those that are not zero, of either sign, as all ones.
RA_DEVICE uint32_t not_zero(uint32_t pair) {
  return (pair & 0x7fffu ? 0xffffu : 0u) | (pair & 0x7fff0000u ? 0xffff0000u : 0u);
}

// Note [sieve]. A row of B that no row of A weighs counts as zeros: it may be garbage, and 0 NaN =
// NaN. Fragments of A and B have A's columns and B's rows in the same lanes: kept[0] is for those
// of the first eight rows of B, kept[1] for the others.
template <int kBands>
RA_DEVICE void find_weighed(uint32_t (&kept)[2], const uint32_t (&a)[kBands][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t bits = 0;
#pragma unroll
    for (int band = 0; band < kBands; ++band) bits |= a[band][2 * half] | a[band][2 * half + 1];
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, lanes);
    kept[half] = not_zero(bits);
  }
}

// sum += A B. B: kDepth rows of a tile, and of its columns, by 16, every kShares-th of `share`.
template <typename Elem, int kDim, int kDepth, int kShares, bool kSieve, typename A, int kBands,
          int kTiles>
RA_DEVICE void accumulate(float (&sum)[kBands][kTiles][4], const A& a, uint32_t b_tile, int share) {
  const ColumnOperand<kDim> b(b_tile, 0, 16 * share);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t rows[kBands][4], kept[2];
#pragma unroll
    for (int band = 0; band < kBands; ++band) a.load(rows[band], band, k);
    if constexpr (kSieve) find_weighed(kept, rows);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t columns[4];
      b.load(columns, k, 8 * kShares * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kSieve) columns[i] &= kept[i % 2];
      }
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        Elem::mma(sum[band][j], rows[band], columns[0], columns[1]);
        Elem::mma(sum[band][j + 1], rows[band], columns[2], columns[3]);
      }
    }
  }
}

// sum += weights B, for the rows and the columns of a warp.
template <int kDim, bool kSieve, typename Plan, typename Elem, int kBands, int kTiles>
RA_DEVICE void accumulate(float (&sum)[kBands][kTiles][4], const WeightTile<Plan, Elem>& weights,
                          const WarpPlace<Plan>& at, uint32_t b_tile) {
  accumulate<Elem, kDim, Plan::kStream, Plan::kSides, kSieve>(
      sum, WeightRows<Plan>(weights.tile, at.row), b_tile, at.side);
}

}  // namespace ring_attention::cuda::sm80
