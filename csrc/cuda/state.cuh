// SPDX-License-Identifier: BSD-3-Clause
//
// The arithmetic of scores and of running states, Note [state] of params.h, one row at a time.
//
// Note [lazy reference]. P = 2^(s - m) is computed with the reference m that the row already has.
// Only where a row's largest score exceeds it by more than kLazyMax is m raised to that score and
// the row's state shrunk; ordinary data does so once. kLazyMax is what P's dtype can hold. Each
// row decides for itself, so that no row's result depends on its neighbours in a tile.
#pragma once

#include "elements.cuh"

namespace ring_attention::cuda {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLn2Rest = -1.90465432e-9f;  // ln(2) - kLn2
constexpr float kInfinity = __builtin_huge_valf();

// From q.k to scores in log2 units: scaled, or c tanh(scale q.k / c). A score is rounded before a
// reference is subtracted from it (never contracted to a fused multiply-add), so that the largest
// has P = 1 exactly, however large it is; alike in the forward and in float32's backward.
struct ScoreScale {
  float scale;   // without softcap
  float slope;   // with it: scale / softcap,
  float height;  // softcap, in log2 units

  static ScoreScale of(double scale, double softcap) {
    return {.scale = static_cast<float>(scale * 1.44269504088896340736),
            .slope = softcap != 0 ? static_cast<float>(scale / softcap) : 0.0f,
            .height = static_cast<float>(softcap * 1.44269504088896340736)};
  }

  template <bool kSoftcap>
  RA_DEVICE float apply(float product) const {
    if constexpr (kSoftcap) return __fmul_rn(height, tanh(product * slope));
    return __fmul_rn(product, scale);
  }

  // tanh(x) = (1 - e) / (1 + e), e = exp(-2 |x|). To 2e-7 absolute: tanh.approx is not enough.
  static RA_DEVICE float tanh(float x) {
    const float e = exp2_approx(fabsf(x) * (-2.0f * kLog2e));
    return copysignf((1.0f - e) * reciprocal_approx(1.0f + e), x);
  }
};

// m and l of a row; acc lies wherever the kernel keeps it.
struct RowState {
  float m = -kInfinity, l = 0.0f;

  // A state whose only key is the sink.
  static RA_DEVICE RowState of_sink(float sink) {
    if (sink == -kInfinity) return {};
    return {sink * kLog2e, 1.0f};
  }

  // What is subtracted from scores. Not yet a reference: (-inf) - (-inf) would give NaN.
  RA_DEVICE float reference() const { return m == -kInfinity ? 0.0f : m; }

  // Sees to it that scores up to `most` can be taken: see Note [lazy reference]. Returns the factor
  // that acc is to be shrunk by.
  RA_DEVICE float raise(float most, float lazy_max) {
    const bool raised = most > m + lazy_max;
    const float shrink = raised ? exp2_approx(m - most) : 1.0f;
    m = raised ? most : m;
    l *= shrink;
    return shrink;
  }

  // ln of the sum of exponentials, ln(2) (m + log2 l), rounded once: the sum is kept in two floats.
  RA_DEVICE float lse() const {
    if (l == 0.0f) return -kInfinity;
    const float log_l = log2f(l), sum = __fadd_rn(m, log_l);
    const float part = __fsub_rn(sum, m);
    const float rest = __fadd_rn(__fsub_rn(m, __fsub_rn(sum, part)), __fsub_rn(log_l, part));
    return fmaf(sum, kLn2, fmaf(sum, kLn2Rest, rest * kLn2));
  }
  // out = acc times this.
  RA_DEVICE float normalizer() const { return l == 0.0f ? 0.0f : 1.0f / l; }
};

// The weights with which two states become one: acc = ours acc + theirs other_acc.
struct Join {
  RowState joined;
  float ours, theirs;

  RA_DEVICE Join(const RowState& a, const RowState& b) : joined(a), ours(1.0f), theirs(0.0f) {
    if (b.l == 0.0f) return;
    // An empty state's reference means nothing.
    joined.m = a.l == 0.0f ? b.m : fmaxf(a.m, b.m);
    ours = a.l == 0.0f ? 0.0f : exp2_approx(a.m - joined.m);
    theirs = exp2_approx(b.m - joined.m);
    joined.l = ours * a.l + theirs * b.l;
  }
};

}  // namespace ring_attention::cuda
