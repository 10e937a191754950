// SPDX-License-Identifier: BSD-3-Clause
//
// The forward kernel. One task folds all K/V blocks into one tile of query rows:
//
//   load the tile: Q^T, and its state (O^T, m, l)
//   for each K/V block, interval, key block that the tile sees:
//     K as it is, V's columns
//     for each panel of the tile that sees the key block:
//       for each stripe of keys:  S^T = K Q^T;  mask;  P^T = exp2(S^T - m);  l += P^T
//       O^T += V^T P^T
//   write the state, or out = O / l and lse
//
// Scores are transposed: keys are rows, queries are lanes, so that maximum, sum and rescaling are
// per lane and nothing is ever reduced across lanes. A row's result depends on its own interval
// only: key blocks lie on a fixed grid, and what a row does not see adds exact zeros.
//
// Note [lazy maximum]. P is computed with the reference the row already has. A block whose sum
// exceeds 2^24 is folded again with its own maximum as the reference, for the rows concerned only;
// the first reference is the maximum of the first stripe in which the row sees a key. Ordinary
// data never folds twice, and max - 24 <= m <= max holds after each block.
//
// Memory: Q^T and O^T of a tile, V's columns and P of one key block; none grows with the sequence.
#pragma once

#include "tile.inl"

namespace ring_attention::cpu {
namespace {

template <typename Arch>
class Forward {
  using Elem = typename Arch::Elem;
  using State = typename Arch::State;
  using Unit = typename Arch::Unit;
  using V = typename Arch::V;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPair = Arch::kPair;
  static constexpr int64_t kStripe = Arch::kStripe;
  static constexpr State kLog2e = static_cast<State>(1.44269504088896340736L);
  static constexpr State kLn2 = static_cast<State>(0.69314718055994530942L);
  static constexpr State kMostSum = 0x1p24;
  static constexpr State kLargest = std::numeric_limits<State>::max();
  static constexpr State kInfinity = std::numeric_limits<State>::infinity();

 public:
  static void run(const ForwardParams& p, const Parallel& parallel) {
    const int64_t panel = Arch::panel_rows(std::max(p.head_dim, p.v_head_dim));
    const int64_t rows = QueryRows(p, panel).count();
    const int64_t problems = p.batch * p.kv_heads;
    const int64_t tile_rows = panel * panels_per_tile(problems * divide_up(rows, panel));
    const int64_t tiles = divide_up(rows, tile_rows);
    parallel(problems * tiles, [&](int64_t task) {
      // Causal rows are the heavier the later they come: these first.
      const int64_t tile = tiles - 1 - task / problems, problem = task % problems;
      Forward kernel(p, panel, tile_rows, problem / p.kv_heads, problem % p.kv_heads);
      kernel.fold(tile * tile_rows, std::min(tile_rows, rows - tile * tile_rows));
    });
  }

 private:
  // As many panels as share the packing of a key block, but few enough for all threads to work.
  static int64_t panels_per_tile(int64_t panels) {
    return std::clamp<int64_t>(panels / 32, 1, Arch::kTilePanels);
  }

  Forward(const ForwardParams& params, int64_t panel, int64_t tile_rows, int64_t b, int64_t kv_head)
      : p_(params),
        kv_head_(kv_head),
        units_(round_up(params.head_dim, Arch::kDepthStep) / kPair),
        v_rows_(round_up(params.v_head_dim, Arch::kWidthStep)),
        x_scale_(static_cast<State>(params.scale) * kLog2e),
        tile_(params, panel, b, kv_head),
        scratch_([&](Scratch& scratch) { take(scratch, tile_rows); }) {}

  void take(Scratch& scratch, int64_t tile_rows) {
    const int64_t panel = tile_.panel, dim = std::max(p_.head_dim, p_.v_head_dim);
    const int64_t width = round_up(dim, Arch::kWidthStep);
    tile_.take(scratch, tile_rows);
    scratch.array(q_, tile_rows * round_up(units_, kLanes));
    scratch.array(acc_, tile_rows * v_rows_);
    scratch.array(m_, tile_rows);
    scratch.array(l_, tile_rows);
    scratch.array(block_l_, panel);
    scratch.array(scores_, kStripe * panel);
    scratch.array(p_units_, round_up(Arch::kKeyBlock, kPair) / kPair * panel);
    scratch.array(k_copy_, Arch::kKeyBlock * width / kPair);
    scratch.array(v_copy_, Arch::kKeyBlock * width / kPair);
    scratch.array(v_transposed_, Arch::kTransposeColumns ? Arch::kKeyBlock * width / kPair : 0);
    scratch.array(row_, kLanes * v_rows_);
  }

  void fold(int64_t first, int64_t count) {
    [[maybe_unused]] const typename Arch::Session session;
    tile_.move_to(first, count);
    load();
    for (int64_t i = 0; i < p_.num_blocks; ++i) {
      for (int64_t n = 0; n < p_.blocks[i].intervals; ++n) {
        tile_.see(p_.blocks[i], n);
        for (int64_t from = tile_.extent.begin / Arch::kKeyBlock * Arch::kKeyBlock;
             from < tile_.extent.end; from += Arch::kKeyBlock) {
          fold_keys(p_.blocks[i], from);
        }
      }
    }
    if (p_.last) {
      write_output();
    } else {
      write_state();
    }
  }

  // One key block into every panel that sees it.
  void fold_keys(const KVBlock& block, int64_t from) {
    const int64_t count = std::min<int64_t>(Arch::kKeyBlock, block.k_len - from);
    if (!tile_.touches(from, count)) return;
    bool marks[Arch::kKeyBlock];
    const bool* unseen = tile_.mark_unseen(from, count, marks);
    KeyBlock<Arch> keys;
    keys.set(first_row(block.k, block.k_stride, from), block.k_stride.row, count, unseen);
    const Operand<Unit> k = keys.as_rows(p_.head_dim, k_copy_);
    keys.set(first_row(block.v, block.v_stride, from), block.v_stride.row, count, unseen);
    const Operand<Unit> v = keys.as_columns(p_.v_head_dim, v_copy_, v_transposed_);
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      if (!tile_.extents[u].touches(from, from + count)) continue;
      const bool masked = !tile_.extents[u].covers(from, from + keys.padded);
      if (masked) tile_.bound(u, from, count);
      const StripeRange range = stripes_of(tile_.extents[u], from, keys.padded, kStripe);
      softmax(u, k, range, masked);
      accumulate(u, v, range);
    }
  }

  const Elem* first_row(const void* data, const Strides& stride, int64_t from) const {
    return static_cast<const Elem*>(data) + tile_.batch * stride.batch + kv_head_ * stride.head +
           from * stride.row;
  }

  // ---- one panel, one key block

  // P^T of the panel, and l += its sums, see Note [lazy maximum].
  void softmax(int64_t u, Operand<Unit> k, StripeRange range, bool masked) {
    first_reference(u, k, range, masked);
    do {
      std::memset(block_l_, 0, tile_.panel * sizeof *block_l_);
      for (int64_t j = range.begin; j < range.end; j += kStripe) {
        const int64_t keys = std::min(kStripe, range.end - j);
        scores(u, k, j, keys);
        softmax_update(u, j, keys, masked);
      }
    } while (raise_reference(u, k, range, masked));
    State* l = l_ + u * tile_.panel;
    for (int64_t i = 0; i < tile_.panel; i += kLanes) {
      (V::load(l + i) + V::load(block_l_ + i)).store(l + i);
    }
  }

  // S^T = K Q^T for one stripe, unscaled; with a softcap c, c tanh(S / c) in log2 units.
  void scores(int64_t u, Operand<Unit> k, int64_t j, int64_t keys) {
    const int64_t panel = tile_.panel;
    multiply<Arch>(keys, panel, units_, k.at(j, 0), q_ + u * panel * units_, panel, scores_, panel,
                   false);
    if (p_.softcap != 0.0) cap_scores(keys * panel);
  }

  void cap_scores(int64_t count) {
    const V slope = V::set(static_cast<State>(p_.scale / p_.softcap));
    const V height = V::set(static_cast<State>(p_.softcap) * kLog2e);
    for (int64_t i = 0; i < count; i += kLanes) {
      (height * tanh(V::load(scores_ + i) * slope)).store(scores_ + i);
    }
  }

  V x_scale() const { return V::set(p_.softcap != 0.0 ? State{1} : x_scale_); }

  void softmax_update(int64_t u, int64_t j, int64_t keys, bool masked) {
    if (masked) {
      softmax_lanes<true>(u, j, keys);
    } else {
      softmax_lanes<false>(u, j, keys);
    }
  }

  template <bool kMasked>
  void softmax_lanes(int64_t u, int64_t j, int64_t keys) {
    const int64_t panel = tile_.panel;
    const V scale = x_scale();
    for (int64_t i = 0; i < panel; i += kLanes) {
      const V minus_m = V::zero() - V::load(m_ + u * panel + i);
      const V low = V::load(tile_.low + i), high = V::load(tile_.high + i);
      V sum = V::load(block_l_ + i);
      for (int64_t r = 0; r < keys; r += kPair) {
        V prob[kPair];
#pragma GCC unroll 2
        for (int s = 0; s < kPair; ++s) {
          const V x = fma(V::load(scores_ + (r + s) * panel + i), scale, minus_m);
          prob[s] = exp2<Arch::kExpTerms>(x);
          if constexpr (kMasked) prob[s] = keep_visible(j + r + s, low, high, prob[s], V::zero());
          sum = sum + prob[s];
        }
        Arch::store_lanes(prob, p_units_ + (j + r) / kPair * panel + i);
      }
      sum.store(block_l_ + i);
    }
  }

  // Rows without a reference take the maximum of the first stripe in which they see a key.
  void first_reference(int64_t u, Operand<Unit> k, StripeRange range, bool masked) {
    State* m = m_ + u * tile_.panel;
    for (int64_t j = range.begin; j < range.end; j += kStripe) {
      if (!any_below(m, -kLargest)) return;
      maximum(u, k, {j, std::min(j + kStripe, range.end)}, masked);
      for (int64_t i = 0; i < tile_.panel; ++i) {
        if (m[i] == -kInfinity) m[i] = block_l_[i];
      }
    }
  }

  // Rows whose sum is too large for their reference move it to the maximum of the block and shrink
  // what they had. True if there were any: the block is to be folded again.
  bool raise_reference(int64_t u, Operand<Unit> k, StripeRange range, bool masked) {
    const int64_t panel = tile_.panel;
    if (!any_above(block_l_, kMostSum)) return false;
    bool exceeded[Arch::kMaxPanel];
    for (int64_t i = 0; i < panel; ++i) exceeded[i] = block_l_[i] > kMostSum;
    maximum(u, k, range, masked);
    for (int64_t i = 0; i < panel; ++i) {
      State& m = m_[u * panel + i];
      const State raised = exceeded[i] ? std::max(m, block_l_[i]) : m;
      block_l_[i] = raised == m ? State{1} : std::exp2(m - raised);
      m = raised;
      l_[u * panel + i] *= block_l_[i];
    }
    for (int64_t d = 0; d < v_rows_; ++d) {
      State* acc = acc_ + (u * v_rows_ + d) * panel;
      for (int64_t i = 0; i < panel; i += kLanes) {
        (V::load(acc + i) * V::load(block_l_ + i)).store(acc + i);
      }
    }
    return true;
  }

  bool any_below(const State* x, State bound) const {
    bool found = false;
    for (int64_t i = 0; i < tile_.panel; i += kLanes) {
      found |= V::any(less(V::load(x + i), V::set(bound)));
    }
    return found;
  }
  bool any_above(const State* x, State bound) const {
    bool found = false;
    for (int64_t i = 0; i < tile_.panel; i += kLanes) {
      found |= V::any(less(V::set(bound), V::load(x + i)));
    }
    return found;
  }

  // Leaves in block_l_ each row's largest score, in log2 units, among the keys it sees.
  void maximum(int64_t u, Operand<Unit> k, StripeRange range, bool masked) {
    const int64_t panel = tile_.panel;
    std::fill_n(block_l_, panel, -kInfinity);
    for (int64_t j = range.begin; j < range.end; j += kStripe) {
      const int64_t keys = std::min(kStripe, range.end - j);
      scores(u, k, j, keys);
      for (int64_t i = 0; i < panel; i += kLanes) {
        V most = V::load(block_l_ + i);
        const V low = V::load(tile_.low + i), high = V::load(tile_.high + i);
        for (int64_t r = 0; r < keys; ++r) {
          V x = V::load(scores_ + r * panel + i) * x_scale();
          if (masked) x = keep_visible(j + r, low, high, x, V::set(-kInfinity));
          most = max(most, x);
        }
        most.store(block_l_ + i);
      }
    }
  }

  // O^T += V^T P^T. The product is summed from zero and then added: with two levels of sums the
  // error stays flat in the number of keys.
  void accumulate(int64_t u, Operand<Unit> v, StripeRange range) {
    const int64_t panel = tile_.panel, key = range.begin / kPair;
    multiply<Arch>(round_up(p_.v_head_dim, Arch::kDepthStep), panel,
                   (range.end - range.begin) / kPair, v.at(0, key), p_units_ + key * panel, panel,
                   acc_ + u * v_rows_ * panel, panel, true);
  }

  // ---- state and output

  void load() {
    const int64_t panel = tile_.panel;
    const Elem* const* q = tile_.rows_of(p_.q, p_.q_stride);
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      transpose_rows<Arch>(q + u * panel, panel, p_.head_dim, units_, q_ + u * panel * units_);
    }
    std::memset(acc_, 0, tile_.rows * v_rows_ * sizeof *acc_);
    for (int64_t i = 0; i < tile_.rows; ++i) {
      m_[i] = -kInfinity;
      l_[i] = 0;
      if (tile_.real(i)) load_row(i);
    }
    if (!p_.first) load_acc();
  }

  void load_row(int64_t i) {
    if (!p_.first) {
      const int64_t row = tile_.flat(i, p_);
      l_[i] = static_cast<const State*>(p_.l)[row];
      if (l_[i] != 0) m_[i] = static_cast<const State*>(p_.m)[row];
    } else if (p_.sinks != nullptr) {
      const State sink = static_cast<const State*>(p_.sinks)[tile_.offset(i, {0, 1, 0})] * kLog2e;
      if (sink == -kInfinity) return;
      m_[i] = sink;
      l_[i] = 1;
    }
  }

  void load_acc() {
    const int64_t panel = tile_.panel;
    const State* from = static_cast<const State*>(p_.acc);
    for (int64_t i = 0; i < tile_.rows; i += kLanes) {
      std::memset(row_, 0, kLanes * v_rows_ * sizeof *row_);
      for (int64_t r = 0; r < kLanes; ++r) {
        if (!tile_.real(i + r)) continue;
        std::memcpy(row_ + r * v_rows_, from + tile_.flat(i + r, p_) * p_.v_head_dim,
                    p_.v_head_dim * sizeof *row_);
      }
      State* acc = acc_ + i / panel * v_rows_ * panel + i % panel;
      for (int64_t d = 0; d < v_rows_; d += kLanes) {
        transpose_block(row_ + d, v_rows_, acc + d * panel, panel, V{});
      }
    }
  }

  void write_state() {
    for_transposed<Arch>(tile_, acc_, v_rows_, row_, [&](int64_t i, const State* acc) {
      const int64_t row = tile_.flat(i, p_);
      static_cast<State*>(p_.m)[row] = m_[i];
      static_cast<State*>(p_.l)[row] = l_[i];
      std::memcpy(static_cast<State*>(p_.acc) + row * p_.v_head_dim, acc,
                  p_.v_head_dim * sizeof *acc);
    });
  }

  void write_output() {
    for_transposed<Arch>(tile_, acc_, v_rows_, row_, [&](int64_t i, const State* acc) {
      const bool empty = l_[i] == 0;
      const State inverse = empty ? State{0} : State{1} / l_[i];
      Elem* out = static_cast<Elem*>(p_.out) + tile_.offset(i, p_.out_stride);
      scale_row<Arch>(acc, p_.v_head_dim, inverse, out);
      static_cast<State*>(p_.lse)[tile_.flat(i, p_)] =
          empty ? -kInfinity : (m_[i] + std::log2(l_[i])) * kLn2;
    });
  }

  const ForwardParams& p_;
  const int64_t kv_head_;
  const int64_t units_;   // of q and k along head_dim
  const int64_t v_rows_;  // of O^T
  const State x_scale_;   // scores to log2 units
  QueryTile<Arch> tile_;
  Unit* q_;         // Q^T [panels][units][panel]
  State* acc_;      // O^T [panels][v_rows][panel]
  State* m_;        // [rows]
  State* l_;        // [rows]
  State* block_l_;  // [panel] sums of the key block in hand
  State* scores_;   // S^T [stripe][panel]
  Unit* p_units_;   // P^T [key block / pair][panel]
  Unit* k_copy_;    // where K and V cannot be used as they lie
  Unit* v_copy_;
  Unit* v_transposed_;
  State* row_;       // [lanes][v_rows] rows being turned
  Scratch scratch_;  // owns all of these
};

}  // namespace
}  // namespace ring_attention::cpu
