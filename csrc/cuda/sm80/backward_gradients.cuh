// SPDX-License-Identifier: BSD-3-Clause
//
// From scores and dP to P and dS, in the registers where the products left them.
#pragma once

#include "backward_config.h"
#include "backward_products.cuh"

namespace ring_attention::cuda::sm80 {

// P = exp2(S - lse) and dS = P (dP - delta), times the softcap's derivative 1 - tanh^2; both in
// place. stats(j, e, h) is the RowStats of element [j][e + 2 h], visible(j, e, h) whether its query
// sees its key. What is not visible is selected away: it may be NaN.
template <bool kMasked, bool kSoftcap, typename Elem, int kTiles, typename Stats, typename Visible>
RA_DEVICE void score_gradients(float (&s)[kTiles][4], float (&dp)[kTiles][4],
                               const ScoreScale& scale, const Stats& stats,
                               const Visible& visible) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const RowStats row = stats(j, i % 2, i / 2);
      float score, slope = 1.0f;
      if constexpr (kSoftcap) {
        const float t = ScoreScale::tanh(s[j][i] * scale.slope);
        score = __fmul_rn(scale.height, t);  // rounded as ScoreScale::apply rounds
        slope = 1.0f - t * t;
      } else {
        score = scale.apply<false>(s[j][i]);
      }
      score -= row.lse;
      // fp32 is accurate enough to notice the rounding of lse to log2 units.
      if constexpr (std::is_same_v<Elem, Float32>) score -= row.lse_low;
      // P <= 1, however far the rounding of a huge score carries it. NaN stays NaN.
      const float p = exp2_approx(score > 0.0f ? 0.0f : score);
      const float ds = p * (dp[j][i] - row.delta) * slope;
      const bool keep = !kMasked || visible(j, i % 2, i / 2);
      s[j][i] = keep ? p : 0.0f;
      dp[j][i] = keep ? ds : 0.0f;
    }
  }
}

// The same, as the call and the tile have it at run time.
template <typename Elem, int kTiles, typename Stats, typename Visible>
RA_DEVICE void score_gradients(float (&s)[kTiles][4], float (&dp)[kTiles][4],
                               const BackwardCall& call, bool masked, const Stats& stats,
                               const Visible& visible) {
  if (call.softcap) {
    // One copy of the code: next to two products the mask costs little.
    score_gradients<true, true, Elem>(
        s, dp, call.score, stats, [&](int j, int e, int h) { return !masked || visible(j, e, h); });
  } else if (masked) {
    score_gradients<true, false, Elem>(s, dp, call.score, stats, visible);
  } else {
    score_gradients<false, false, Elem>(s, dp, call.score, stats, visible);
  }
}

// Copies of rows [row, row + kRows) of one head into a tile; those outside [begin, end) as zeros.
template <typename Plan>
struct Rows {
  using Elem = typename Plan::Element;
  using Wide = TileCopy<kColumns<Elem, Plan::kDim>, Plan::kThreads>;
  using VWide = TileCopy<kColumns<Elem, Plan::kVDim>, Plan::kThreads>;
  static constexpr int kUnits = kColumns<Elem, 2> / 2;  // columns of a tile per element

  static RA_DEVICE const char* of_head(const void* data, const Strides& bytes, int64_t sample,
                                       int head) {
    return static_cast<const char*>(data) + sample * bytes.batch + head * bytes.head;
  }
  template <int kRows>
  static RA_DEVICE void load_keys(const BackwardCall& call, const KVBlock& block, int64_t sample,
                                  int kv_head, int row, int begin, int end, uint32_t k,
                                  uint32_t v) {
    Wide::template rows<kRows>(k, of_head(block.k, block.k_stride, sample, kv_head),
                               block.k_stride.row, row, begin, end, kUnits * call.head_dim);
    VWide::template rows<kRows>(v, of_head(block.v, block.v_stride, sample, kv_head),
                                block.v_stride.row, row, begin, end, kUnits * call.v_head_dim);
  }
  template <int kRows>
  static RA_DEVICE void load_queries(const BackwardCall& call, int64_t sample, int head, int row,
                                     uint32_t q, uint32_t dout) {
    Wide::template rows<kRows>(q, of_head(call.q, call.q_stride, sample, head), call.q_stride.row,
                               row, 0, call.q_len, kUnits * call.head_dim);
    VWide::template rows<kRows>(dout, of_head(call.dout, call.dout_stride, sample, head),
                                call.dout_stride.row, row, 0, call.q_len, kUnits * call.v_head_dim);
  }
};

// Adds a warp's sums, times `factor`, to rows [row, row + 16) of `to` [rows, dim]: or writes them,
// where `to` is a part of its own.
template <int kTiles>
RA_DEVICE void write_sums(const float (&sum)[kTiles][4], float factor, float* to, int row, int rows,
                          int dim, bool add) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + lane / 4 + 8 * h;
    if (r >= rows) continue;
    float* at = to + static_cast<int64_t>(r) * dim + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kTiles; ++d) {
      if (8 * d >= dim) break;
      const float2 x = make_float2(sum[d][2 * h] * factor, sum[d][2 * h + 1] * factor);
      auto* pair = reinterpret_cast<float2*>(at + 8 * d);
      const float2 old = add ? *pair : make_float2(0.0f, 0.0f);
      *pair = make_float2(old.x + x.x, old.y + x.y);
    }
  }
}

}  // namespace ring_attention::cuda::sm80
