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

  // Panel u, before anything is folded into it.
  void load(int64_t u) {
    const int64_t begin = u * tile_.panel;
    if (p_.first) {
      std::memset(acc_of(u), 0, v_rows * tile_.panel * sizeof *acc);
    } else {
      for (int64_t i = begin; i < begin + tile_.panel; i += kLanes) load_acc(u, i);
    }
    load_sums(u);
  }

  // Panel u, when all is folded.
  void write(int64_t u) {
    if (p_.last) {
      write_output(u);
    } else {
      write_state(u);
    }
  }

  // Instead of both, where there is nothing to fold.
  void pass(int64_t u) {
    if (p_.first) {
      load(u);
      write(u);
    } else if (p_.last) {
      finish(u);
    }
  }

 private:
  State* acc_of(int64_t u) const { return acc + u * v_rows * tile_.panel; }

  // ---- where the tensors have row i

  int64_t row_bytes() const { return p_.v_head_dim * static_cast<int64_t>(sizeof *acc); }
  State* acc_row(int64_t i) const {
    return static_cast<State*>(p_.acc) + tile_.flat(i, p_) * p_.v_head_dim;
  }
  Elem* out_row(int64_t i) const {
    return static_cast<Elem*>(p_.out) + tile_.offset(i, p_.out_stride);
  }
  State& lse_row(int64_t i) const { return static_cast<State*>(p_.lse)[tile_.flat(i, p_)]; }

  // ---- load

  void load_sums(int64_t u) {
    for (int64_t i = u * tile_.panel; i < (u + 1) * tile_.panel; ++i) {
      m[i] = -kInfinity;
      l[i] = 0;
      if (tile_.real(i)) load_sum(i);
    }
  }

  void load_sum(int64_t i) {
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

  // kLanes rows.
  void load_acc(int64_t u, int64_t i) {
    const State* rows = row_;
    int64_t distance = v_rows;
    if (p_.v_head_dim == v_rows && tile_.evenly_spaced(i, kLanes)) {
      rows = acc_row(i);
      distance = p_.v_head_dim;
    } else {
      std::memset(row_, 0, kLanes * v_rows * sizeof *row_);
      for (int64_t r = 0; r < kLanes; ++r) {
        if (tile_.real(i + r)) std::memcpy(row_ + r * v_rows, acc_row(i + r), row_bytes());
      }
    }
    State* to = acc_of(u) + i % tile_.panel;
    for (int64_t d = 0; d < v_rows; d += kLanes) {
      transpose_block(rows + d, distance, to + d * tile_.panel, tile_.panel, V{});
    }
  }

  // ---- write

  void write_state(int64_t u) {
    for_transposed<Arch>(
        tile_, u, acc_of(u), v_rows, row_, [&](int64_t i) { return acc_row(i); },
        [&](int64_t i, const State* sums, State* to) {
          const int64_t row = tile_.flat(i, p_);
          static_cast<State*>(p_.m)[row] = m[i];
          static_cast<State*>(p_.l)[row] = l[i];
          std::memcpy(to, sums, row_bytes());
        });
  }

  void write_output(int64_t u) {
    m_to_lse(u);
    for_transposed<Arch>(
        tile_, u, acc_of(u), v_rows, row_, [&](int64_t i) { return out_row(i); },
        [&](int64_t i, const State* sums, Elem* to) {
          scale_row<Arch>(sums, p_.v_head_dim, inverse(l[i]), to);
          lse_row(i) = m[i];
        });
  }

  // From the state to the output as the rows lie.
  void finish(int64_t u) {
    load_sums(u);
    m_to_lse(u);
    for (int64_t i = u * tile_.panel; i < (u + 1) * tile_.panel; ++i) {
      if (!tile_.real(i)) continue;
      scale_row<Arch>(acc_row(i), p_.v_head_dim, inverse(l[i]), out_row(i));
      lse_row(i) = m[i];
    }
  }

  static State inverse(State x) { return x == 0 ? State{0} : State{1} / x; }

  // Replaces m of a panel by lse: in vectors.
  void m_to_lse(int64_t u) {
    State* __restrict lse = m + u * tile_.panel;
    const State* __restrict sums = l + u * tile_.panel;
    for (int64_t i = 0; i < tile_.panel; ++i) lse[i] = log_sum_exp(lse[i], sums[i]);
  }

  const ForwardParams& p_;
  const QueryTile<Arch>& tile_;
  State* row_;  // [lanes][v_rows] rows being turned
};

}  // namespace
}  // namespace ring_attention::cpu
