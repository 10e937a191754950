// SPDX-License-Identifier: BSD-3-Clause
//
// The backward kernel, five products without atomics. Query rows and keys are cut into n chunks,
// n by shape; at step t all pairs (query chunk (j + t) mod n, key chunk j) run in parallel: no two
// share dq, dk or dv, and each sum has a fixed order, whatever the number of threads. One task:
//
//   for each interval, tile of the query chunk:
//     load the tile: Q^T, dO^T; Q, dO; lse, delta
//     for each key block of the key chunk that the tile sees:
//       K and V as they are, K's columns
//       for each panel of the tile that sees the key block:
//         for each stripe of keys:  S^T = K Q^T;  dP^T = V dO^T;
//                                   P = exp2(S - lse);  dS = P (dP - delta);  mask
//         dQ^T += K^T dS^T;  dV += P^T dO;  dK += dS^T Q
//       write: add dK, dV to the tensors
//     write: add dQ to the tensor
//
// The orientation is the forward's: keys are rows, queries are lanes. The softcap's derivative
// multiplies dS; the scale multiplies dQ and dK when they are added.
//
// Memory: the operands of a query tile, K, K's columns, V, dK and dV of one key block, P and dS of
// a panel; none grows with the sequence.
#pragma once

#include "tile.inl"

namespace ring_attention::cpu {
namespace {

template <typename Arch>
class Backward {
  using Elem = typename Arch::Elem;
  using State = typename Arch::State;
  using Unit = typename Arch::Unit;
  using V = typename Arch::V;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPair = Arch::kPair;
  static constexpr int64_t kStripe = Arch::kStripe;
  static constexpr State kLog2e = static_cast<State>(1.44269504088896340736L);
  static constexpr State kInfinity = std::numeric_limits<State>::infinity();

 public:
  static void run(const BackwardParams& p, const Parallel& parallel) {
    const int64_t panel = Arch::panel_rows(std::max(p.head_dim, p.v_head_dim));
    const int64_t rows = QueryRows(p, panel).count(), problems = p.batch * p.kv_heads;
    for (int64_t i = 0; i < p.num_blocks; ++i) {
      const KVBlock& block = p.blocks[i];
      if (block.k_len == 0) continue;
      const int64_t n = chunks(problems, std::max(rows, block.k_len));
      const int64_t row_chunk = round_up(divide_up(rows, n), panel);
      const int64_t key_chunk = round_up(divide_up(block.k_len, n), Arch::kKeyBlock);
      for (int64_t t = 0; t < n; ++t) {
        parallel(problems * n, [&](int64_t task) {
          const int64_t j = task / problems, problem = task % problems;
          const int64_t row = (j + t) % n * row_chunk, key = j * key_chunk;
          if (row >= rows || key >= block.k_len) return;
          Backward kernel(p, block, panel, problem / p.kv_heads, problem % p.kv_heads);
          kernel.pair(row, std::min(row + row_chunk, rows), key,
                      std::min(key + key_chunk, block.k_len));
        });
      }
    }
  }

 private:
  // Enough chunks for 64 tasks at a time, of at least 256 rows.
  static int64_t chunks(int64_t problems, int64_t length) {
    return std::clamp<int64_t>(divide_up(64, problems), 1,
                               std::clamp<int64_t>(length / 256, 1, 16));
  }

  Backward(const BackwardParams& params, const KVBlock& block, int64_t panel, int64_t b,
           int64_t kv_head)
      : p_(params),
        block_(block),
        kv_head_(kv_head),
        units_(round_up(params.head_dim, Arch::kDepthStep) / kPair),
        v_units_(round_up(params.v_head_dim, Arch::kDepthStep) / kPair),
        width_(round_up(params.head_dim, Arch::kWidthStep)),
        v_width_(round_up(params.v_head_dim, Arch::kWidthStep)),
        tile_(params, panel, b, kv_head),
        scratch_([&](Scratch& scratch) { take(scratch); }) {}

  void take(Scratch& scratch) {
    const int64_t panel = tile_.panel, rows = Arch::kTilePanels * panel;
    const int64_t keys = Arch::kKeyBlock;
    tile_.take(scratch, rows);
    scratch.array(q_lanes_, rows * round_up(units_, kLanes));
    scratch.array(dout_lanes_, rows * round_up(v_units_, kLanes));
    scratch.array(q_rows_, rows / kPair * width_);
    scratch.array(dout_rows_, rows / kPair * v_width_);
    scratch.array(dq_, rows * width_);
    scratch.array(lse_, rows);
    scratch.array(delta_, rows);
    scratch.array(scores_, kStripe * panel);
    scratch.array(dprobs_, kStripe * panel);
    scratch.array(p_rows_, keys / kPair * panel);
    scratch.array(ds_rows_, keys / kPair * panel);
    scratch.array(ds_lanes_, keys / kPair * panel);
    scratch.array(k_copy_, keys * width_ / kPair);
    scratch.array(k_columns_, keys * width_ / kPair);
    scratch.array(k_transposed_, Arch::kTransposeColumns ? keys * width_ / kPair : 0);
    scratch.array(v_copy_, keys * v_width_ / kPair);
    scratch.array(dk_, keys * width_);
    scratch.array(dv_, keys * v_width_);
    scratch.array(row_, kLanes * width_);
  }

  // One pair of chunks: rows [row, row_end) against keys [key, key_end).
  void pair(int64_t row, int64_t row_end, int64_t key, int64_t key_end) {
    [[maybe_unused]] const typename Arch::Session session;
    const int64_t tile_rows = Arch::kTilePanels * tile_.panel;
    for (int64_t n = 0; n < block_.intervals; ++n) {
      for (int64_t first = row; first < row_end; first += tile_rows) {
        tile_.move_to(first, std::min(tile_rows, row_end - first));
        tile_.see(block_, n);
        if (!tile_.extent.touches(key, key_end)) continue;
        load();
        for (int64_t from = key; from < key_end; from += Arch::kKeyBlock) {
          fold_keys(from, std::min<int64_t>(Arch::kKeyBlock, key_end - from));
        }
        write_dq();
      }
    }
  }

  // One key block against every panel that sees it.
  void fold_keys(int64_t from, int64_t count) {
    if (!tile_.touches(from, count)) return;
    bool marks[Arch::kKeyBlock];
    const bool* unseen = tile_.mark_unseen(from, count, marks);
    KeyBlock<Arch> keys;
    keys.set(first_row(block_.v, block_.v_stride, from), block_.v_stride.row, count, unseen);
    const Operand<Unit> v = keys.as_rows(p_.v_head_dim, v_copy_);
    keys.set(first_row(block_.k, block_.k_stride, from), block_.k_stride.row, count, unseen);
    const Operand<Unit> k = keys.as_rows(p_.head_dim, k_copy_);
    const Operand<Unit> columns = keys.as_columns(p_.head_dim, k_columns_, k_transposed_);
    std::memset(dk_, 0, keys.padded * width_ * sizeof *dk_);
    std::memset(dv_, 0, keys.padded * v_width_ * sizeof *dv_);
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      if (!tile_.extents[u].touches(from, from + count)) continue;
      const bool masked = !tile_.extents[u].covers(from, from + keys.padded);
      if (masked) tile_.bound(u, from, count);
      const StripeRange range = stripes_of(tile_.extents[u], from, keys.padded, kStripe);
      for (int64_t j = range.begin; j < range.end; j += kStripe) {
        const int64_t stripe = std::min(kStripe, range.end - j);
        scores(u, k, v, j, stripe);
        softmax_update(u, j, stripe, masked);
      }
      accumulate(u, columns, range);
    }
    write_keys(from, count);
  }

  const Elem* first_row(const void* data, const Strides& stride, int64_t from) const {
    return static_cast<const Elem*>(data) + tile_.batch * stride.batch + kv_head_ * stride.head +
           from * stride.row;
  }

  // ---- one panel, one key block

  // S^T = K Q^T, unscaled, and dP^T = V dO^T for one stripe.
  void scores(int64_t u, Operand<Unit> k, Operand<Unit> v, int64_t j, int64_t keys) {
    const int64_t panel = tile_.panel;
    multiply<Arch>(keys, panel, units_, k.at(j, 0), q_lanes_ + u * panel * units_, panel, scores_,
                   panel, false);
    multiply<Arch>(keys, panel, v_units_, v.at(j, 0), dout_lanes_ + u * panel * v_units_, panel,
                   dprobs_, panel, false);
  }

  void softmax_update(int64_t u, int64_t j, int64_t keys, bool masked) {
    const bool capped = p_.softcap != 0.0;
    if (masked) {
      capped ? softmax_lanes<true, true>(u, j, keys) : softmax_lanes<true, false>(u, j, keys);
    } else {
      capped ? softmax_lanes<false, true>(u, j, keys) : softmax_lanes<false, false>(u, j, keys);
    }
  }

  // P and dS of one stripe, as the products want them.
  template <bool kMasked, bool kCapped>
  void softmax_lanes(int64_t u, int64_t j, int64_t keys) {
    const int64_t panel = tile_.panel;
    const V scale = V::set(static_cast<State>(kCapped ? p_.softcap : p_.scale) * kLog2e);
    const V slope = V::set(static_cast<State>(kCapped ? p_.scale / p_.softcap : 0.0));
    for (int64_t i = 0; i < panel; i += kLanes) {
      const V minus_lse = V::zero() - V::load(lse_ + u * panel + i);
      const V delta = V::load(delta_ + u * panel + i);
      const V low = V::load(tile_.low + i), high = V::load(tile_.high + i);
      for (int64_t r = 0; r < keys; r += kPair) {
        V prob[kPair], ds[kPair];
#pragma GCC unroll 2
        for (int s = 0; s < kPair; ++s) {
          V score = V::load(scores_ + (r + s) * panel + i);
          if constexpr (kCapped) score = tanh(score * slope);
          prob[s] = exp2<Arch::kExpTerms>(fma(score, scale, minus_lse));
          ds[s] = prob[s] * (V::load(dprobs_ + (r + s) * panel + i) - delta);
          if constexpr (kCapped) ds[s] = ds[s] * (V::set(1) - score * score);
          if constexpr (kMasked) {
            prob[s] = keep_visible(j + r + s, low, high, prob[s], V::zero());
            ds[s] = keep_visible(j + r + s, low, high, ds[s], V::zero());
          }
        }
        Arch::store_rows(prob, p_rows_, j + r, i, panel);
        Arch::store_rows(ds, ds_rows_, j + r, i, panel);
        if constexpr (kPair > 1) {
          Arch::store_lanes(ds, ds_lanes_ + (j + r) / kPair * panel + i);
        }
      }
    }
  }

  void accumulate(int64_t u, Operand<Unit> columns, StripeRange range) {
    const int64_t panel = tile_.panel, keys = range.end - range.begin;
    const int64_t key = range.begin / kPair, row_units = panel / kPair;
    const Unit* ds_lanes = kPair > 1 ? ds_lanes_ : ds_rows_;
    // dQ^T += K^T dS^T
    multiply<Arch>(round_up(p_.head_dim, Arch::kDepthStep), panel, keys / kPair, columns.at(0, key),
                   ds_lanes + key * panel, panel, dq_ + u * width_ * panel, panel, true);
    // dV += P^T dO
    multiply<Arch>(keys, v_width_, row_units, {p_rows_ + range.begin * row_units, row_units, 1},
                   dout_rows_ + u * row_units * v_width_, v_width_, dv_ + range.begin * v_width_,
                   v_width_, true);
    // dK += dS^T Q
    multiply<Arch>(keys, width_, row_units, {ds_rows_ + range.begin * row_units, row_units, 1},
                   q_rows_ + u * row_units * width_, width_, dk_ + range.begin * width_, width_,
                   true);
  }

  // ---- load and write

  void load() {
    load_operand(p_.q, p_.q_stride, p_.head_dim, units_, width_, q_lanes_, q_rows_);
    load_operand(p_.dout, p_.dout_stride, p_.v_head_dim, v_units_, v_width_, dout_lanes_,
                 dout_rows_);
    std::memset(dq_, 0, tile_.rows * width_ * sizeof *dq_);
    for (int64_t i = 0; i < tile_.rows; ++i) {
      // A row without a key, and padding, must have P = 0: its lse reads as +inf.
      lse_[i] = kInfinity;
      delta_[i] = 0;
      if (!tile_.real(i)) continue;
      const int64_t row = tile_.flat(i, p_);
      const State lse = static_cast<const State*>(p_.lse)[row];
      if (lse == -kInfinity) continue;
      lse_[i] = lse * kLog2e;
      delta_[i] = static_cast<const State*>(p_.delta)[row];
    }
  }

  void load_operand(const void* data, const Strides& stride, int64_t dim, int64_t units,
                    int64_t width, Unit* lanes, Unit* rows) {
    const int64_t panel = tile_.panel;
    const Elem* const* source = tile_.rows_of(data, stride);
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      transpose_rows<Arch>(source + u * panel, panel, dim, units, lanes + u * panel * units);
    }
    interleave_rows<Arch>(source, tile_.rows, dim, width, rows);
  }

  void write_keys(int64_t from, int64_t count) {
    const int64_t first = (tile_.batch * p_.kv_heads + kv_head_) * block_.k_len + from;
    for (int64_t j = 0; j < count; ++j) {
      add_row<V>(dk_ + j * width_, p_.head_dim, static_cast<State>(p_.scale),
                 static_cast<State*>(block_.dk) + (first + j) * p_.head_dim);
      add_row<V>(dv_ + j * v_width_, p_.v_head_dim, State{1},
                 static_cast<State*>(block_.dv) + (first + j) * p_.v_head_dim);
    }
  }

  void write_dq() {
    for_transposed<Arch>(tile_, dq_, width_, row_, [&](int64_t i, const State* dq) {
      add_row<V>(dq, p_.head_dim, static_cast<State>(p_.scale),
                 static_cast<State*>(p_.dq) + tile_.flat(i, p_) * p_.head_dim);
    });
  }

  const BackwardParams& p_;
  const KVBlock& block_;
  const int64_t kv_head_;
  const int64_t units_, v_units_;  // of q, k and of dout, v along their head dims, as depth
  const int64_t width_, v_width_;  // the head dims as lanes
  QueryTile<Arch> tile_;
  Unit* q_lanes_;     // Q^T [panels][units][panel]
  Unit* dout_lanes_;  // dO^T [panels][v_units][panel]
  Unit* q_rows_;      // Q [rows / pair][width]
  Unit* dout_rows_;   // dO [rows / pair][v_width]
  State* dq_;         // dQ^T [panels][width][panel]
  State* lse_;        // [rows], log2 units
  State* delta_;      // [rows]
  State* scores_;     // S^T [stripe][panel]
  State* dprobs_;     // dP^T [stripe][panel]
  Unit* p_rows_;      // P^T [key block][panel / pair]: pairs of queries
  Unit* ds_rows_;     // dS^T, the same
  Unit* ds_lanes_;    // dS^T [key block / pair][panel]: pairs of keys
  Unit* k_copy_;      // where K and V cannot be used as they lie
  Unit* k_columns_;
  Unit* k_transposed_;
  Unit* v_copy_;
  State* dk_;        // [key block][width]
  State* dv_;        // [key block][v_width]
  State* row_;       // [lanes][width] rows being turned
  Scratch scratch_;  // owns all of these
};

}  // namespace
}  // namespace ring_attention::cpu
