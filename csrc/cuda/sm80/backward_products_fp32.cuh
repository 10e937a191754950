// SPDX-License-Identifier: BSD-3-Clause
//
// The same products for float32, by FFMA, whose peak is a sixteenth of the tensor cores' on an
// A100: exact, and meant for tests and small models. Sums lie in the same registers; weights in
// shared memory are transposed, [stream][rows], for a lane wants single ones.
#pragma once

#include "backward_products.cuh"
#include "products_fp32.cuh"

namespace ring_attention::cuda::sm80 {

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

template <typename Plan, int kDim>
struct KeptRows<Plan, kDim, Float32> {
  uint32_t tile;
  int first_row;

  RA_DEVICE KeptRows(uint32_t tile, int first_row) : tile(tile), first_row(first_row) {}
  RA_DEVICE void keep() const {}
};

template <typename Plan, int kDim, int kBands, int kTiles, typename First>
RA_DEVICE void multiply(float (&sum)[kBands][kTiles][4], const KeptRows<Plan, kDim, Float32>& a,
                        uint32_t b_tile, int b_row, const First& first) {
  fill(sum, first);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int c = 0; c < kDim / 4; ++c) {
    float4 rows[2 * kBands];
#pragma unroll
    for (int r = 0; r < 2 * kBands; ++r) {
      rows[r] = load_floats<kDim>(a.tile, a.first_row + g + 8 * r, c);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 column = load_floats<kDim>(b_tile, b_row + 8 * j + 2 * t + e, c);
#pragma unroll
        for (int r = 0; r < 2 * kBands; ++r) {
          float& x = sum[r / 2][j][e + r % 2 * 2];
          x = multiply_add(rows[r], column, x);
        }
      }
    }
  }
}

template <typename Plan>
struct WeightTile<Plan, Float32> {
  // Lanes 4 g + t write columns 2 t + e and rows g, and meet each bank once.
  static constexpr int kPitch = Plan::kRows + 4;
  uint32_t tile;

  static RA_DEVICE uint32_t offset(int row, int column) { return (column * kPitch + row) * 4; }

  RA_DEVICE void store(const float (&weights)[Plan::kBands][Plan::kScoreTiles][4],
                       const WarpPlace<Plan>& at) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t to = tile + offset(at.row + g, at.side * 8 * Plan::kScoreTiles + 2 * t);
#pragma unroll
    for (int band = 0; band < Plan::kBands; ++band) {
#pragma unroll
      for (int i = 0; i < 4 * Plan::kScoreTiles; ++i) {
        const int j = i / 4, h = i / 2 % 2, e = i % 2;
        store_shared(to + offset(16 * band + 8 * h, 8 * j + e),
                     __float_as_uint(weights[band][j][2 * h + e]));
      }
    }
  }
};

// Always sieved, see Note [sieve]: what no row of a warp's weighs is skipped.
template <int kDim, bool kSieve, typename Plan, int kBands, int kTiles>
RA_DEVICE void accumulate(float (&sum)[kBands][kTiles][4], const WeightTile<Plan, Float32>& weights,
                          const WarpPlace<Plan>& at, uint32_t b_tile) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t from = weights.tile + weights.offset(at.row + g, 0);
#pragma unroll 2
  for (int k = 0; k < Plan::kStream; ++k) {
    float w[2 * kBands];
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2 * kBands; ++r) {
      w[r] = load_shared_4(from + weights.offset(8 * r, k));
      any |= w[r] != 0.0f;
    }
    if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = 16 * (j / 2 * Plan::kSides + at.side) + 8 * (j % 2) + 2 * t;
      const float2 b = load_pair<kDim>(b_tile, k, column);
#pragma unroll
      for (int r = 0; r < 2 * kBands; ++r) {
        float* x = sum[r / 2][j] + r % 2 * 2;
        x[0] = fmaf(w[r], b.x, x[0]), x[1] = fmaf(w[r], b.y, x[1]);
      }
    }
  }
}

}  // namespace ring_attention::cuda::sm80
