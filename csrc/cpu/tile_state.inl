// SPDX-License-Identifier: BSD-3-Clause
//
// What a forward has of a tile's rows, see Note [state] in params.h: O^T, m and l, from where
// earlier calls left it, and to there or to the output.
#pragma once

#include "tile.inl"

namespace ring_attention::cpu {
namespace {

template <typename Arch>
class TileState {
  using Elem = typename Arch::Elem;
  using State = typename Arch::State;
  using V = typename Arch::V;
  static constexpr int kLanes = V::kLanes;
  static constexpr State kInfinity = std::numeric_limits<State>::infinity();

 public:
  const int64_t v_rows;  // of O^T
  State* acc;            // O^T [panels][v_rows][panel]
  State* m;              // [rows]
  State* l;              // [rows]

  TileState(const ForwardParams& params, const QueryTile<Arch>& tile)
      : v_rows(round_up(params.v_head_dim, Arch::kWidthStep)), p_(params), tile_(tile) {}

  void take(Scratch& scratch, int64_t max_rows) {
    scratch.array(acc, max_rows * v_rows);
    scratch.array(m, max_rows);
    scratch.array(l, max_rows);
    scratch.array(row_, kLanes * v_rows);
  }

  // Panel u.
  void load(int64_t u) {
    const int64_t panel = tile_.panel;
    std::memset(acc + u * v_rows * panel, 0, v_rows * panel * sizeof *acc);
    for (int64_t i = u * panel; i < (u + 1) * panel; ++i) {
      m[i] = -kInfinity;
      l[i] = 0;
      if (tile_.real(i)) load_row(i);
    }
    if (!p_.first) load_acc(u);
  }

  void write() {
    if (p_.last) {
      write_output();
    } else {
      write_state();
    }
  }

 private:
  void load_row(int64_t i) {
    if (!p_.first) {
      const int64_t row = tile_.flat(i, p_);
      l[i] = static_cast<const State*>(p_.l)[row];
      if (l[i] != 0) m[i] = static_cast<const State*>(p_.m)[row];
    } else if (p_.sinks != nullptr) {
      const State sink = static_cast<const State*>(p_.sinks)[tile_.offset(i, {0, 1, 0})] *
                         static_cast<State>(kLog2e);
      if (sink == -kInfinity) return;
      m[i] = sink;
      l[i] = 1;
    }
  }

  void load_acc(int64_t u) {
    const int64_t panel = tile_.panel;
    for (int64_t i = u * panel; i < (u + 1) * panel; i += kLanes) {
      if (!tile_.real(i)) continue;
      std::memset(row_, 0, kLanes * v_rows * sizeof *row_);
      for (int64_t r = 0; r < kLanes; ++r) {
        if (!tile_.real(i + r)) continue;
        std::memcpy(row_ + r * v_rows, acc_row(i + r), p_.v_head_dim * sizeof *row_);
      }
      State* to = acc + u * v_rows * panel + i % panel;
      for (int64_t d = 0; d < v_rows; d += kLanes) {
        transpose_block(row_ + d, v_rows, to + d * panel, panel, V{});
      }
    }
  }

  State* acc_row(int64_t i) const {
    return static_cast<State*>(p_.acc) + tile_.flat(i, p_) * p_.v_head_dim;
  }
  Elem* out_row(int64_t i) const {
    return static_cast<Elem*>(p_.out) + tile_.offset(i, p_.out_stride);
  }

  void write_state() {
    for_transposed<Arch>(
        tile_, acc, v_rows, row_, [&](int64_t i) { return acc_row(i); },
        [&](int64_t i, const State* sums, State* to) {
          const int64_t row = tile_.flat(i, p_);
          static_cast<State*>(p_.m)[row] = m[i];
          static_cast<State*>(p_.l)[row] = l[i];
          std::memcpy(to, sums, p_.v_head_dim * sizeof *to);
        });
  }

  void write_output() {
    for_transposed<Arch>(
        tile_, acc, v_rows, row_, [&](int64_t i) { return out_row(i); },
        [&, lse = log_sums()](int64_t i, const State* sums, Elem* to) {
          scale_row<Arch>(sums, p_.v_head_dim, l[i] == 0 ? State{0} : State{1} / l[i], to);
          static_cast<State*>(p_.lse)[tile_.flat(i, p_)] = lse[i];
        });
  }

  // lse of all rows, instead of m; vectors of them.
  const State* log_sums() {
    State* __restrict lse = m;
    const State* __restrict sums = l;
    for (int64_t i = 0; i < tile_.rows; ++i) lse[i] = log_sum_exp(lse[i], sums[i]);
    return lse;
  }

  const ForwardParams& p_;
  const QueryTile<Arch>& tile_;
  State* row_;  // [lanes][v_rows] rows being turned
};

}  // namespace
}  // namespace ring_attention::cpu
