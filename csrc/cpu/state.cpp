// SPDX-License-Identifier: BSD-3-Clause
//
// Row-wise arithmetic on states and outputs. Bound by memory, so plain loops serve every ISA.
#include <algorithm>
#include <cmath>
#include <limits>

#include "elements.h"
#include "kernels.h"
#include "logarithms.h"

namespace ring_attention::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

// Runs body(row) for all rows, in tasks of a fixed number of rows.
template <typename Body>
void for_rows(int64_t rows, const Parallel& parallel, const Body& body) {
  parallel((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
  });
}

// Offset of row (b, h, i) of a strided [batch, heads, q_len, ...] tensor, from its flat index.
int64_t offset(int64_t row, int64_t heads, int64_t q_len, const Strides& stride) {
  const int64_t i = row % q_len, h = row / q_len % heads, b = row / q_len / heads;
  return b * stride.batch + h * stride.head + i * stride.row;
}

template <typename State>
void combine_row(int64_t dim, State* acc, State& m, State& l, const State* other_acc, State other_m,
                 State other_l) {
  if (other_l == 0) return;
  // An empty state's reference means nothing: (-inf) - (-inf) would give NaN.
  const State reference = l == 0 ? other_m : std::max(m, other_m);
  const State ours = l == 0 ? State{0} : std::exp2(m - reference);
  const State theirs = std::exp2(other_m - reference);
  for (int64_t d = 0; d < dim; ++d) acc[d] = ours * acc[d] + theirs * other_acc[d];
  l = ours * l + theirs * other_l;
  m = reference;
}

template <typename Elem>
void finish_row(const ForwardParams& p, int64_t row) {
  using State = StateOf<Elem>;
  const State m = static_cast<const State*>(p.m)[row];
  const State l = static_cast<const State*>(p.l)[row];
  const State* acc = static_cast<const State*>(p.acc) + row * p.v_head_dim;
  Elem* out = static_cast<Elem*>(p.out) + offset(row, p.heads, p.q_len, p.out_stride);
  const State inverse = l == 0 ? State{0} : State{1} / l;
  for (int64_t d = 0; d < p.v_head_dim; ++d) narrow(acc[d] * inverse, out[d]);
  static_cast<State*>(p.lse)[row] =
      log_sum_exp(l == 0 ? -std::numeric_limits<State>::infinity() : m, l);
}

template <typename Elem>
void delta_row(const DeltaParams& p, int64_t row) {
  using State = StateOf<Elem>;
  const Elem* out = static_cast<const Elem*>(p.out) + offset(row, p.heads, p.q_len, p.out_stride);
  const Elem* dout =
      static_cast<const Elem*>(p.dout) + offset(row, p.heads, p.q_len, p.dout_stride);
  State sums[8] = {};  // head dims are multiples of 8; eight sums keep the loop parallel
  for (int64_t d = 0; d < p.v_head_dim; d += 8) {
    for (int64_t i = 0; i < 8; ++i) sums[i] += widen(out[d + i]) * widen(dout[d + i]);
  }
  State sum = 0;
  for (State s : sums) sum += s;
  if (p.dlse) sum -= static_cast<const State*>(p.dlse)[row];
  static_cast<State*>(p.delta)[row] = sum;
}

template <typename State>
void combine_rows(int64_t rows, int64_t dim, void* acc, void* m, void* l, const void* other_acc,
                  const void* other_m, const void* other_l, const Parallel& parallel) {
  for_rows(rows, parallel, [&](int64_t row) {
    combine_row(dim, static_cast<State*>(acc) + row * dim, static_cast<State*>(m)[row],
                static_cast<State*>(l)[row], static_cast<const State*>(other_acc) + row * dim,
                static_cast<const State*>(other_m)[row], static_cast<const State*>(other_l)[row]);
  });
}

// One head is one task and one fixed order of additions.
template <typename State>
void sink_gradients(const void* sinks, const void* lse, const void* delta, void* dsinks,
                    int64_t batch, int64_t heads, int64_t q_len, const Parallel& parallel) {
  const auto* lse_rows = static_cast<const State*>(lse);
  const auto* delta_rows = static_cast<const State*>(delta);
  parallel(heads, [&](int64_t head) {
    const double sink = static_cast<const State*>(sinks)[head];
    double sum = 0;
    // A sink of -inf is none, and its rows may have lse = -inf: (-inf) - (-inf) would give NaN.
    const int64_t samples = std::isinf(sink) ? 0 : batch;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t row = (sample * heads + head) * q_len;
      for (int64_t i = row; i < row + q_len; ++i) {
        sum -= std::exp(sink - lse_rows[i]) * delta_rows[i];
      }
    }
    static_cast<State*>(dsinks)[head] = static_cast<State>(sum);
  });
}

}  // namespace

void combine(DType state, int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
             const void* other_acc, const void* other_m, const void* other_l,
             const Parallel& parallel) {
  const auto join = state == DType::kFloat64 ? combine_rows<double> : combine_rows<float>;
  join(rows, v_head_dim, acc, m, l, other_acc, other_m, other_l, parallel);
}

void finish(const ForwardParams& params, const Parallel& parallel) {
  visit_elements(params.dtype, [&]<typename Elem>(Elem) {
    for_rows(params.batch * params.heads * params.q_len, parallel,
             [&](int64_t row) { finish_row<Elem>(params, row); });
  });
}

void delta(const DeltaParams& params, const Parallel& parallel) {
  visit_elements(params.dtype, [&]<typename Elem>(Elem) {
    for_rows(params.batch * params.heads * params.q_len, parallel,
             [&](int64_t row) { delta_row<Elem>(params, row); });
  });
}

void sink_gradient(DType state, const void* sinks, const void* lse, const void* delta, void* dsinks,
                   int64_t batch, int64_t heads, int64_t q_len, const Parallel& parallel) {
  const auto sum = state == DType::kFloat64 ? sink_gradients<double> : sink_gradients<float>;
  sum(sinks, lse, delta, dsinks, batch, heads, q_len, parallel);
}

}  // namespace ring_attention::cpu
