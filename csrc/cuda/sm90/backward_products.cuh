// SPDX-License-Identifier: BSD-3-Clause
//
// What the two backward kernels share: their products, P and dS, the copies and the sums' way out.
#pragma once

#include "../backward_walks.cuh"
#include "../shared_tile.cuh"
#include "../start.h"
#include "backward_config.h"

namespace ring_attention::cuda::sm90 {

// Fragments of 64 rows by kColumns, a warp's 16 of them.
template <int kColumns>
using Sums = float[kColumns / 8][4];
template <int kColumns>
using Weights = uint32_t[kColumns / 16][4];

// This warpgroup's first row of a tile; the compiler knows that its warps agree.
RA_DEVICE int group_row() { return __shfl_sync(kAllLanes, threadIdx.x / 128 * 64, 0); }

// sums = rows of `kept` times passing rows, transposed.
template <typename Elem, typename Kept, typename Stream, int kDim, int kPassing>
RA_DEVICE void start_scores(Sums<kPassing>& sums, uint32_t kept, uint32_t passing) {
  const uint64_t a = Kept::descriptor(kept) + Kept::step(group_row(), 0);
  const uint64_t b = Stream::descriptor(passing);
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    Wgmma<Elem, kPassing>::start_rows(sums, a + Kept::step(0, d), b + Stream::step(0, d), d > 0);
  }
  wgmma_commit();
}

// sums += weights times passing rows.
template <typename Elem, typename Stream, int kDim, int kPassing>
RA_DEVICE void start_sums(Sums<kDim>& sums, const Weights<kPassing>& weights, uint32_t passing) {
  const uint64_t b = Stream::descriptor(passing);
#pragma unroll
  for (int row = 0; row < kPassing; row += 16) {
    add_columns<Elem, Stream, kDim>(sums, weights[row / 16], b, row);
  }
  wgmma_commit();
}

// P = 2^(S - lse), lse(j, e, r) of column 8 j + 2 (lane mod 4) + e and row lane / 4 + 8 r. P <= 1,
// however far the rounding of a huge score carries it; NaN stays NaN.
template <int kTiles, typename Lse>
RA_DEVICE void exponentiate(float (&s)[kTiles][4], float scale, const Lse& lse) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    const int j = i / 4, e = i % 2, r = i / 2 % 2;
    float& x = s[j][i % 4];
    x = exp2_approx(min_or_nan(fmaf(x, scale, -lse(j, e, r)), 0.0f));
  }
}
// dS = P (dP - delta).
template <int kTiles, typename MinusDelta>
RA_DEVICE void differentiate(float (&dp)[kTiles][4], const float (&p)[kTiles][4],
                             const MinusDelta& minus_delta) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    const int j = i / 4, e = i % 2, r = i / 2 % 2;
    dp[j][i % 4] = p[j][i % 4] * (dp[j][i % 4] + minus_delta(j, e, r));
  }
}
// Zero where a query does not see a key. A select: it may be NaN.
template <int kTiles, typename Visible>
RA_DEVICE void mask(float (&x)[kTiles][4], const Visible& visible) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    const int j = i / 4, e = i % 2, r = i / 2 % 2;
    x[j][i % 4] = visible(j, e, r) ? x[j][i % 4] : 0.0f;
  }
}
template <typename Elem, int kTiles>
RA_DEVICE void pack(const float (&x)[kTiles][4], uint32_t (&weights)[kTiles / 2][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    weights[j / 2][j % 2 * 2] = Elem::pack(x[j][0], x[j][1]);
    weights[j / 2][j % 2 * 2 + 1] = Elem::pack(x[j][2], x[j][3]);
  }
}

// Copies of rows [row, row + kRows) of one head into a tile, those outside [begin, end) as zeros.
// By kThreads threads with successive numbers.
template <typename Layout, int kRows, int kThreads>
RA_DEVICE void copy_rows(uint32_t tile, const void* data, const Strides& bytes, int sample,
                         int head, int row, int begin, int end, int dim) {
  const char* of_head = static_cast<const char*>(data) + sample * bytes.batch + head * bytes.head;
  TileCopy<Layout, kThreads>::template rows<kRows>(tile, of_head, bytes.row, row, begin, end, dim);
}

// Until the rows that stay are there, for readers: those that loaders copied have arrived when
// their first tiles have.
template <typename Tile>
RA_DEVICE void wait_for_kept_rows() {
  cp_async_wait<0>();
  fence_before_wgmma();
  named_barrier(2, Tile::kRoles.readers);
}

// Adds sums, times `factor`, to the rows from `row` on of `to` [rows, dim]: or writes them, where
// `to` is a part of its own.
template <int kTiles>
RA_DEVICE void write_sums(const float (&sums)[kTiles][4], float factor, float* to, int row,
                          int rows, int dim, bool add) {
  const int lane = threadIdx.x % 32, first = row + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int here = first + 8 * r;
    if (here >= rows) continue;
    float* of_row = to + static_cast<int64_t>(here) * dim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (8 * j >= dim) break;
      auto* pair = reinterpret_cast<float2*>(of_row + 8 * j);
      const float2 old = add ? *pair : make_float2(0.0f, 0.0f);
      *pair = make_float2(old.x + sums[j][2 * r] * factor, old.y + sums[j][2 * r + 1] * factor);
    }
  }
}

}  // namespace ring_attention::cuda::sm90
