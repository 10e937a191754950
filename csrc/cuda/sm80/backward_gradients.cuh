// SPDX-License-Identifier: BSD-3-Clause
//
// From scores and dP to P and dS, in the registers where the products left them; and what both
// kernels read and write in global memory.
#pragma once

#include "backward_products.cuh"
#include "backward_products_fp32.cuh"

namespace ring_attention::cuda::sm80 {

// What is known of a row of queries; lse_low only for float32.
struct RowLse {
  float lse, lse_low;
};

// S - lse, in log2 units. float32 is accurate enough to notice a score's rounding, which is the
// forward's, and lse's own.
template <bool kSoftcap, typename Elem>
RA_DEVICE float log2_p(float product, float& slope, const ScoreScale& scale, const RowLse& row) {
  if constexpr (kSoftcap) {
    const float t = ScoreScale::tanh(product * scale.slope);
    slope = 1.0f - t * t;
    const float score = __fmul_rn(scale.height, t);  // rounded as ScoreScale::apply rounds
    return score - row.lse - row.lse_low;
  } else if constexpr (std::is_same_v<Elem, Float32>) {
    return scale.apply<false>(product) - row.lse - row.lse_low;
  } else {
    return fmaf(product, scale.scale, -row.lse);
  }
}

// P = exp2(S - lse) and dS = P (dP - delta), times the softcap's derivative 1 - tanh^2; both in
// place, of S and dP - delta. lse(j, e, r) is of column 8 j + 2 t + e and row g + 8 r of the
// warp's, visible(j, e, r) whether the one's query sees the other's key. What is not visible is
// selected away: it may be NaN.
template <bool kMasked, bool kSoftcap, typename Elem, int kBands, int kTiles, typename Lse,
          typename Visible>
RA_DEVICE void score_gradients(float (&s)[kBands][kTiles][4], float (&dp)[kBands][kTiles][4],
                               const ScoreScale& scale, const Lse& lse, const Visible& visible) {
#pragma unroll
  for (int i = 0; i < kTiles * kBands * 4; ++i) {
    const int j = i / (4 * kBands), e = i / (2 * kBands) % 2, r = i % (2 * kBands);
    float& x = s[r / 2][j][e + r % 2 * 2];
    float& y = dp[r / 2][j][e + r % 2 * 2];
    float slope = 1.0f;
    const float exponent = log2_p<kSoftcap, Elem>(x, slope, scale, lse(j, e, r));
    // P <= 1, however far the rounding of a huge score carries it. NaN stays NaN.
    const float p = exp2_approx(min_or_nan(exponent, 0.0f));
    const float ds = kSoftcap ? p * y * slope : p * y;
    const bool keep = !kMasked || visible(j, e, r);
    x = keep ? p : 0.0f;
    y = keep ? ds : 0.0f;
  }
}

// The same, as the call and the tile have it at run time.
template <typename Elem, int kBands, int kTiles, typename Lse, typename Visible>
RA_DEVICE void score_gradients(float (&s)[kBands][kTiles][4], float (&dp)[kBands][kTiles][4],
                               const BackwardCall& call, bool masked, const Lse& lse,
                               const Visible& visible) {
  if (call.softcap) {
    // One copy of the code: next to two products the mask costs little.
    score_gradients<true, true, Elem>(
        s, dp, call.score, lse, [&](int j, int e, int r) { return !masked || visible(j, e, r); });
  } else if (masked) {
    score_gradients<true, false, Elem>(s, dp, call.score, lse, visible);
  } else {
    score_gradients<false, false, Elem>(s, dp, call.score, lse, visible);
  }
}

// A row of floats lies in shared memory like one of twice as many 16-bit elements.
template <typename Elem, int kDim>
constexpr int kRowUnits = kDim * static_cast<int>(sizeof(Elem)) / 2;

// Copies of rows [row, row + kRows) of one head into a tile; those outside [begin, end) as zeros.
template <typename Plan>
struct Rows {
  using Elem = typename Plan::Element;
  using Wide = TileCopy<TileLayout<kRowUnits<Elem, Plan::kDim>>, Plan::kThreads>;
  using VWide = TileCopy<TileLayout<kRowUnits<Elem, Plan::kVDim>>, Plan::kThreads>;
  static constexpr int kUnits = kRowUnits<Elem, 1>;  // columns of a tile per element

  static RA_DEVICE const char* of_head(const void* data, const Strides& bytes, int sample,
                                       int head) {
    return static_cast<const char*>(data) + sample * bytes.batch + head * bytes.head;
  }
  template <int kRows>
  static RA_DEVICE void load_keys(const BackwardCall& call, const KVBlock& block, int sample,
                                  int kv_head, int row, int begin, int end, uint32_t k,
                                  uint32_t v) {
    Wide::template rows<kRows>(k, of_head(block.k, block.k_stride, sample, kv_head),
                               block.k_stride.row, row, begin, end, kUnits * call.head_dim);
    VWide::template rows<kRows>(v, of_head(block.v, block.v_stride, sample, kv_head),
                                block.v_stride.row, row, begin, end, kUnits * call.v_head_dim);
  }
  template <int kRows>
  static RA_DEVICE void load_queries(const BackwardCall& call, int sample, int head, int row,
                                     uint32_t q, uint32_t dout) {
    Wide::template rows<kRows>(q, of_head(call.q, call.q_stride, sample, head), call.q_stride.row,
                               row, 0, call.q_len, kUnits * call.head_dim);
    VWide::template rows<kRows>(dout, of_head(call.dout, call.dout_stride, sample, head),
                                call.dout_stride.row, row, 0, call.q_len, kUnits * call.v_head_dim);
  }
};

// Adds a warp's sums, times `factor`, to the rows from `row` on of `to` [rows, dim]: or writes
// them, where `to` is a part of its own.
template <typename Plan, int kBands, int kTiles>
RA_DEVICE void write_sums(const float (&sum)[kBands][kTiles][4], const WarpPlace<Plan>& at,
                          float factor, float* to, int row, int rows, int dim, bool add) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2 * kBands; ++r) {
    const int here = row + at.row + lane / 4 + 8 * r;
    if (here >= rows) continue;
    float* of_row = to + static_cast<int64_t>(here) * dim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = 16 * (j / 2 * Plan::kSides + at.side) + 8 * (j % 2);
      if (column >= dim) break;
      const float* x = sum[r / 2][j] + r % 2 * 2;
      auto* pair = reinterpret_cast<float2*>(of_row + column);
      const float2 old = add ? *pair : make_float2(0.0f, 0.0f);
      *pair = make_float2(old.x + x[0] * factor, old.y + x[1] * factor);
    }
  }
}

}  // namespace ring_attention::cuda::sm80
