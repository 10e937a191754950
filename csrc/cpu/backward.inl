// SPDX-License-Identifier: BSD-3-Clause
//
// The backward kernel, five products without atomics. One task is a pair of chunks, query rows
// against keys, see Note [pairs]:
//
//   load the rows, a tile: Q^T, dO^T; Q, dO; lse, delta
//   for each interval:
//     for each key block of the key chunk that the tile sees:
//       K and V as they are, K's columns
//       for each pass, a few panels of the tile that see the key block:
//         for each panel:
//           for each stripe of keys:  S^T = K Q^T;  P = exp2(S - lse);  mask
//                                     dP^T = V dO^T;  dS = P (dP - delta);  mask
//           dQ^T += K^T dS^T
//         dV += P^T dO;  dK += dS^T Q
//       write: add dK, dV to the tensors
//   write: add dQ to the tensor
//
// The orientation is the forward's: keys are rows, queries are lanes, P and dS are formed of sums
// that are still in registers. The softcap's derivative multiplies dS; the scale multiplies dQ and
// dK when they are added.
//
// Memory: the operands of a query tile, K, K's columns, V, dK and dV of one key block, P and dS of
// a pass; none grows with the sequence.
#pragma once

#include "pair_schedule.h"
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
  // Whether P is worth the part of lse that its rounding to log2 units loses.
  static constexpr bool kExactLse = sizeof(Elem) == sizeof(float);
  static constexpr int64_t kMaxPass = 8;
  static constexpr State kInfinity = std::numeric_limits<State>::infinity();

 public:
  static void run(const BackwardParams& p, const Parallel& parallel) {
    const TileShape shape = Arch::backward_shape(std::max(p.head_dim, p.v_head_dim));
    static_assert(Arch::backward_shape(1).pass <= kMaxPass);
    static_assert(Arch::backward_shape(kMaxHeadDim).pass <= kMaxPass);
    for (int64_t i = 0; i < p.num_blocks; ++i) {
      const KVBlock& block = p.blocks[i];
      if (block.k_len == 0) continue;
      PairSchedule schedule(p, block, shape, parallel.threads);
      schedule.run(parallel, [&](const PairSchedule::Pair& pair) {
        Backward(p, block, shape, pair.batch, pair.kv_head).fold(pair);
      });
    }
  }

 private:
  Backward(const BackwardParams& params, const KVBlock& block, const TileShape& shape, int64_t b,
           int64_t kv_head)
      : p_(params),
        block_(block),
        shape_(shape),
        kv_head_(kv_head),
        units_(round_up(params.head_dim, Arch::kDepthStep) / kPair),
        v_units_(round_up(params.v_head_dim, Arch::kDepthStep) / kPair),
        score_units_(params),
        width_(round_up(params.head_dim, Arch::kWidthStep)),
        v_width_(round_up(params.v_head_dim, Arch::kWidthStep)),
        pass_units_(shape.pass * shape.panel / kPair),
        tile_(params, shape.panel, b, kv_head),
        scratch_([&](Scratch& scratch) { take(scratch); }) {}

  void take(Scratch& scratch) {
    const int64_t panel = tile_.panel, rows = shape_.panels * panel, keys = shape_.key_block;
    tile_.take(scratch, rows);
    scratch.array(q_lanes_, rows * round_up(units_, kLanes));
    scratch.array(dout_lanes_, rows * round_up(v_units_, kLanes));
    scratch.array(q_copy_, rows / kPair * round_up(width_, kLaneBlock));
    scratch.array(dout_copy_, rows / kPair * round_up(v_width_, kLaneBlock));
    scratch.array(dq_, rows * width_);
    scratch.array(lse_, rows);
    scratch.array(lse_low_, kExactLse ? rows : 0);
    scratch.array(delta_, rows);
    scratch.array(weights_, shape_.stripe * panel);
    scratch.array(p_rows_, keys * pass_units_);
    scratch.array(ds_rows_, keys * pass_units_);
    scratch.array(ds_lanes_, kPair > 1 ? keys / kPair * panel : 0);
    scratch.array(k_copy_, keys * width_ / kPair);
    scratch.array(k_columns_, keys * width_ / kPair);
    scratch.array(k_transposed_, Arch::kTransposeColumns ? keys * width_ / kPair : 0);
    scratch.array(v_copy_, keys * v_width_ / kPair);
    scratch.array(dk_scratch_, keys * width_);
    scratch.array(dv_scratch_, keys * v_width_);
    scratch.array(row_, kLanes * width_);
  }

  void fold(const PairSchedule::Pair& pair) {
    [[maybe_unused]] const typename Arch::Session session;
    tile_.move_to(pair.row, pair.row_end - pair.row);
    load();
    const auto sees = [&](int64_t n) {
      tile_.see(block_, n);
      return tile_.span.touches(pair.key, pair.key_end);
    };
    int64_t last = block_.intervals - 1;
    while (last > 0 && !sees(last)) --last;
    for (int64_t n = 0; n <= last; ++n) {
      if (!sees(n)) continue;
      for (int64_t from = pair.key; from < pair.key_end; from += shape_.key_block) {
        const int64_t end = std::min(from + shape_.key_block, pair.key_end);
        if (tile_.touching(from, end - from) > 0) {
          pair.wait_for_keys(end);
          fold_keys(from, end - from);
        }
        if (n == last) pair.done_with_keys(end);
      }
    }
    write_dq();
  }

  // One key block against every panel that sees it.
  void fold_keys(int64_t from, int64_t count) {
    bool marks[Arch::kMaxKeyBlock];
    const bool* unseen = tile_.mark_unseen(from, count, marks);
    const int64_t begin = tile_.span.begin - from, end = tile_.span.end - from;
    KeyBlock<Arch> keys;
    keys.set(first_row(block_.v, block_.v_stride, from), block_.v_stride.row, count, begin, end,
             unseen);
    const Operand<Unit> v = keys.as_rows(p_.v_head_dim, v_copy_);
    keys.set(first_row(block_.k, block_.k_stride, from), block_.k_stride.row, count, begin, end,
             unseen);
    const Operand<Unit> k = keys.as_rows(p_.head_dim, k_copy_);
    const Operand<Unit> columns = keys.as_columns(p_.head_dim, k_columns_, k_transposed_);
    sum_keys_from(from, keys);
    for (int64_t pass = 0; pass < tile_.panels(); pass += shape_.pass) {
      const int64_t pass_end = std::min(pass + shape_.pass, tile_.panels());
      for (int64_t u = pass; u < pass_end; ++u) {
        if (!tile_.extents[u].touches(from, from + count)) continue;
        if (!tile_.extents[u].covers(from, from + keys.padded)) tile_.bound(u, from, count);
        const KeyRange<Arch> range(tile_.extents[u], from, keys.padded, tile_.lanes(u));
        if (p_.softcap != 0.0) {
          softmax<true>(u, k, v, from, range);
        } else {
          softmax<false>(u, k, v, from, range);
        }
        accumulate_dq(u, columns, range);
      }
      accumulate_keys(pass, pass_end, from, keys);
    }
    if (!in_place_) write_keys(from, count);
  }

  const Elem* first_row(const void* data, const Strides& stride, int64_t from) const {
    return static_cast<const Elem*>(data) + tile_.batch * stride.batch + kv_head_ * stride.head +
           from * stride.row;
  }
  // ---- one panel, one key block

  // Where a panel's rows lie within its pass, in units of P and dS.
  int64_t pass_column(int64_t u) const { return u % shape_.pass * tile_.panel / kPair; }

  // P and dS of the panel: S and dP of some keys at a time, so that the weights stay in L1.
  template <bool kCapped>
  void softmax(int64_t u, Operand<Unit> k, Operand<Unit> v, int64_t from, KeyRange<Arch> range) {
    for (int64_t j = range.begin; j < range.end; j += shape_.stripe) {
      const Panel panel = panel_of<kCapped>(u, from, j);
      for_stretches(std::min(shape_.stripe, range.end - j), panel.full_begin, panel.full_end,
                    range.grid, [&]<bool kMasked>(int64_t begin, int64_t end) {
                      probabilities<kCapped, kMasked>(u, k, panel, begin, end);
                      score_gradients<kMasked>(u, v, panel, begin, end);
                    });
    }
  }

  // What a tile of products is met with, see Forward::Panel. dS = weight (dP - delta), with weight
  // = P times the softcap's derivative; what P is stored as may serve, where nothing was
  // multiplied.
  struct Panel {
    const State* lse;
    const State* lse_low;
    const State* delta;
    const State* low;
    const State* high;
    State* weights;  // these and the next ones: of the first key of the stripe
    int64_t weight_row;
    Unit* p_rows;
    Unit* ds_rows;
    int64_t row;  // of p_rows and ds_rows
    Unit* ds_lanes;
    int64_t lanes_row;
    int64_t first_key, full_begin, full_end;
    ScoreUnits<Arch> units;
  };

  template <bool kCapped>
  Panel panel_of(int64_t u, int64_t from, int64_t stripe) const {
    const int64_t panel = tile_.panel, at = stripe * pass_units_ + pass_column(u);
    Panel view = {.lse = lse_ + u * panel,
                  .lse_low = lse_low_ + u * panel,
                  .delta = delta_ + u * panel,
                  .low = tile_.low,
                  .high = tile_.high,
                  .weights = weights_,
                  .weight_row = panel,
                  .p_rows = p_rows_ + at,
                  .ds_rows = ds_rows_ + at,
                  .row = pass_units_,
                  .ds_lanes = ds_lanes_ + stripe / kPair * panel,
                  .lanes_row = panel,
                  .first_key = stripe,
                  .full_begin = tile_.extents[u].full_begin - from - stripe,
                  .full_end = tile_.extents[u].full_end - from - stripe,
                  .units = score_units_};
    if constexpr (kPair == 1 && !kCapped) {
      view.weights = view.p_rows;
      view.weight_row = view.row;
    }
    return view;
  }

  // P^T = exp2(S^T - lse), S^T = K Q^T, for the keys [begin, end) of a stripe.
  template <bool kCapped, bool kMasked>
  __attribute__((noinline)) void probabilities(int64_t u, Operand<Unit> k, Panel panel,
                                               int64_t begin, int64_t end) {
    for_tiles<Arch, 2>(end - begin, tile_.lanes(u), units_, k.at(panel.first_key + begin, 0),
                       {q_lanes_ + u * tile_.panel * units_, tile_.panel},
                       [&]<int kRows, int kVecs>(V(&scores)[kRows][kVecs], int64_t i, int64_t lane)
                           __attribute__((always_inline)) {
                             probability_tile<kCapped, kMasked>(scores, panel, begin + i, lane);
                           });
  }

  template <bool kCapped, bool kMasked, int kRows, int kVecs>
  static RA_INLINE void probability_tile(const V (&scores)[kRows][kVecs], const Panel& panel,
                                         int64_t i, int64_t lane) {
    constexpr bool kOwnWeights = kPair > 1 || kCapped;
    const V one = V::set(1);
    const int64_t key = panel.first_key + i;
    Unit* p_rows[kRows / kPair];
    State* weights[kRows];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      if (r % kPair == 0) p_rows[r / kPair] = panel.p_rows + (i + r) * panel.row + lane / kPair;
      weights[r] = panel.weights + (i + r) * panel.weight_row + lane;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = lane + v * kLanes;
      const V lse = V::load(panel.lse + at);
      const V lse_low = kExactLse ? V::load(panel.lse_low + at) : V::zero();
      V low = V::zero(), high = V::zero();
      if constexpr (kMasked) low = V::load(panel.low + at), high = V::load(panel.high + at);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; r += 2) {
        V prob[2], score[2];
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          score[s] = panel.units.template of<kCapped>(scores[r + s][v]);
          prob[s] = (kCapped ? score[s] * V::set(panel.units.height) : score[s]) - lse;
          if constexpr (kExactLse) prob[s] = prob[s] - lse_low;
        }
        // P <= 1, however far the rounding of a huge score carries it.
        exp2_both<Arch::kExpTerms, true>(prob);
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          if constexpr (kMasked) {
            prob[s] = keep_visible(key + r + s, low, high, prob[s], V::zero());
          }
          if constexpr (kOwnWeights) {
            const V weight = kCapped ? prob[s] * (one - score[s] * score[s]) : prob[s];
            weight.store(weights[r + s] + v * kLanes);
          }
        }
#pragma GCC unroll 2
        for (int s = 0; s < 2; s += kPair) {
          Arch::store_rows(prob + s, p_rows[(r + s) / kPair] + v * kLanes / kPair, panel.row);
        }
      }
    }
  }

  // dS^T = weight (dP^T - delta), dP^T = V dO^T, for the keys [begin, end) of a stripe.
  template <bool kMasked>
  __attribute__((noinline)) void score_gradients(int64_t u, Operand<Unit> v, Panel panel,
                                                 int64_t begin, int64_t end) {
    for_tiles<Arch, 2>(end - begin, tile_.lanes(u), v_units_, v.at(panel.first_key + begin, 0),
                       {dout_lanes_ + u * tile_.panel * v_units_, tile_.panel},
                       [&]<int kRows, int kVecs>(V(&dprobs)[kRows][kVecs], int64_t i, int64_t lane)
                           __attribute__((always_inline)) {
                             score_gradient_tile<kMasked>(dprobs, panel, begin + i, lane);
                           });
  }

  template <bool kMasked, int kRows, int kVecs>
  static RA_INLINE void score_gradient_tile(const V (&dprobs)[kRows][kVecs], const Panel& panel,
                                            int64_t i, int64_t lane) {
    const int64_t key = panel.first_key + i;
    Unit* ds_rows[kRows / kPair];
    Unit* ds_lanes[kRows / kPair];
    const State* weights[kRows];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      if (r % kPair == 0) {
        ds_rows[r / kPair] = panel.ds_rows + (i + r) * panel.row + lane / kPair;
        ds_lanes[r / kPair] = panel.ds_lanes + (i + r) / kPair * panel.lanes_row + lane;
      }
      weights[r] = panel.weights + (i + r) * panel.weight_row + lane;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = lane + v * kLanes;
      const V delta = V::load(panel.delta + at);
      V low = V::zero(), high = V::zero();
      if constexpr (kMasked) low = V::load(panel.low + at), high = V::load(panel.high + at);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; r += kPair) {
        V ds[kPair];
#pragma GCC unroll 2
        for (int s = 0; s < kPair; ++s) {
          ds[s] = V::load(weights[r + s] + v * kLanes) * (dprobs[r + s][v] - delta);
          if constexpr (kMasked) ds[s] = keep_visible(key + r + s, low, high, ds[s], V::zero());
        }
        Arch::store_rows(ds, ds_rows[r / kPair] + v * kLanes / kPair, panel.row);
        if constexpr (kPair > 1) Arch::store_lanes(ds, ds_lanes[r / kPair] + v * kLanes);
      }
    }
  }

  // dQ^T += K^T dS^T
  void accumulate_dq(int64_t u, Operand<Unit> columns, KeyRange<Arch> range) {
    const int64_t panel = tile_.panel, key = range.sum_begin / kPair;
    const Unit* ds = kPair > 1 ? ds_lanes_ : ds_rows_ + pass_column(u);
    const int64_t ds_row = kPair > 1 ? panel : pass_units_;
    multiply_into<Arch>(round_up(p_.head_dim, Arch::kDepthStep), tile_.lanes(u),
                        range.sum_count() / kPair, columns.at(0, key), {ds + key * ds_row, ds_row},
                        dq_ + u * width_ * panel, panel);
  }

  // dV += P^T dO and dK += dS^T Q over the rows of a pass. Where what its panels see begins or ends
  // in steps, so do the sums: over all panels that see some keys, neighbours at once.
  void accumulate_keys(int64_t pass, int64_t pass_end, int64_t from, const KeyBlock<Arch>& keys) {
    int64_t begins[kMaxPass], ends[kMaxPass], steps[2 * kMaxPass], count = 0;
    for (int64_t u = pass; u < pass_end; ++u) {
      begins[u - pass] = ends[u - pass] = 0;
      if (!tile_.extents[u].touches(from, from + keys.count)) continue;
      const KeyRange<Arch> range(tile_.extents[u], from, keys.padded, tile_.lanes(u));
      steps[count++] = begins[u - pass] = range.sum_begin;
      steps[count++] = ends[u - pass] = range.sum_end;
    }
    std::sort(steps, steps + count);
    count = std::unique(steps, steps + count) - steps;
    for (int64_t i = 0; i + 1 < count; ++i) {
      const auto sees = [&](int64_t u) {
        return begins[u - pass] <= steps[i] && steps[i] < ends[u - pass];
      };
      for (int64_t u = pass, end; u < pass_end; u = end) {
        end = u + 1;
        if (!sees(u)) continue;
        while (end < pass_end && tile_.lanes(end - 1) == tile_.panel && sees(end)) ++end;
        accumulate_keys_of(u, end, steps[i], steps[i + 1]);
      }
    }
  }

  // The same over the rows of the panels [u, end), of the keys [begin, key_end).
  void accumulate_keys_of(int64_t u, int64_t end, int64_t begin, int64_t key_end) {
    const int64_t rows = (end - 1 - u) * tile_.panel + tile_.lanes(end - 1);
    const int64_t first = u * tile_.panel / kPair;
    const int64_t at = begin * pass_units_ + pass_column(u);
    multiply_into<Arch>(key_end - begin, v_width_, rows / kPair, {p_rows_ + at, pass_units_, 1},
                        dout_rows_.from(first), dv_ + begin * v_width_, v_width_);
    multiply_into<Arch>(key_end - begin, width_, rows / kPair, {ds_rows_ + at, pass_units_, 1},
                        q_rows_.from(first), dk_ + begin * width_, width_,
                        static_cast<State>(p_.scale));
  }

  // ---- load and write

  void load() {
    q_rows_ = load_operand(p_.q, p_.q_stride, p_.head_dim, units_, q_lanes_, q_copy_);
    score_units_.scale_queries(q_lanes_, tile_.rows * units_);
    dout_rows_ =
        load_operand(p_.dout, p_.dout_stride, p_.v_head_dim, v_units_, dout_lanes_, dout_copy_);
    std::memset(dq_, 0, tile_.rows * width_ * sizeof *dq_);
    for (int64_t i = 0; i < tile_.rows; ++i) {
      // A row without a key, and padding, must have P = 0: its lse reads as +inf.
      lse_[i] = kInfinity;
      delta_[i] = 0;
      if constexpr (kExactLse) lse_low_[i] = 0;
      if (!tile_.real(i)) continue;
      const int64_t row = tile_.flat(i, p_);
      const State lse = static_cast<const State*>(p_.lse)[row];
      if (lse == -kInfinity) continue;
      const Log2Units<State> log2_units(lse);
      lse_[i] = log2_units.high;
      if constexpr (kExactLse) lse_low_[i] = log2_units.low;
      delta_[i] = static_cast<const State*>(p_.delta)[row];
    }
  }

  // X^T of every panel, and X: as it lies, or a copy.
  Lanes<Unit> load_operand(const void* data, const Strides& stride, int64_t dim, int64_t units,
                           Unit* lanes, Unit* copy) {
    const int64_t panel = tile_.panel, width = round_up(dim, Arch::kWidthStep);
    const Elem* const* source = tile_.rows_of(data, stride);
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      transpose_rows<Arch>(source + u * panel, tile_.lanes(u), dim, units,
                           lanes + u * panel * units, panel);
    }
    if constexpr (kInPlace<Arch> && kPair == 1) {
      const bool aligned = reinterpret_cast<uintptr_t>(source[0]) % sizeof(V) == 0;
      const bool dense = stride.row == dim && dim <= kLaneBlock;
      const bool even = tile_.evenly_spaced(0, tile_.rows);
      if (aligned && dense && width == dim && even) return {source[0], dim};
    }
    return interleave_lanes<Arch>(source, tile_.rows, dim, copy);
  }

  // Where dK and dV of a key block are summed: in the tensors, or, where tiles are larger than what
  // these have room for, in scratch.
  void sum_keys_from(int64_t from, const KeyBlock<Arch>& keys) {
    in_place_ = keys.count == keys.padded && width_ == p_.head_dim && v_width_ == p_.v_head_dim;
    if (in_place_) {
      dk_ = gradient_row(block_.dk, p_.head_dim, from);
      dv_ = gradient_row(block_.dv, p_.v_head_dim, from);
    } else {
      dk_ = dk_scratch_;
      dv_ = dv_scratch_;
      std::memset(dk_, 0, keys.padded * width_ * sizeof *dk_);
      std::memset(dv_, 0, keys.padded * v_width_ * sizeof *dv_);
    }
  }

  State* gradient_row(void* gradient, int64_t dim, int64_t key) const {
    const int64_t row = (tile_.batch * p_.kv_heads + kv_head_) * block_.k_len + key;
    return static_cast<State*>(gradient) + row * dim;
  }

  void write_keys(int64_t from, int64_t count) {
    State* dk = gradient_row(block_.dk, p_.head_dim, from);
    State* dv = gradient_row(block_.dv, p_.v_head_dim, from);
    for (int64_t j = 0; j < count; ++j) {
      add_row<V>(dk_ + j * width_, p_.head_dim, State{1}, dk + j * p_.head_dim);
      add_row<V>(dv_ + j * v_width_, p_.v_head_dim, State{1}, dv + j * p_.v_head_dim);
    }
  }

  void write_dq() {
    const auto dq_row = [&](int64_t i) {
      return static_cast<State*>(p_.dq) + tile_.flat(i, p_) * p_.head_dim;
    };
    const auto add = [&](int64_t, const State* dq, State* to) {
      add_row<V>(dq, p_.head_dim, static_cast<State>(p_.scale), to);
    };
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      for_transposed<Arch>(tile_, u, dq_ + u * width_ * tile_.panel, width_, row_, dq_row, add);
    }
  }

  const BackwardParams& p_;
  const KVBlock& block_;
  const TileShape shape_;
  const int64_t kv_head_;
  const int64_t units_, v_units_;  // of q, k and of dout, v along their head dims, as depth
  const ScoreUnits<Arch> score_units_;
  const int64_t width_, v_width_;  // the head dims as lanes
  const int64_t pass_units_;       // the rows of a pass
  QueryTile<Arch> tile_;
  Unit* q_lanes_;          // Q^T [panels][units][panel], scaled
  Unit* dout_lanes_;       // dO^T [panels][v_units][panel]
  Lanes<Unit> q_rows_;     // Q [rows / pair] of width lanes
  Lanes<Unit> dout_rows_;  // dO [rows / pair] of v_width lanes
  Unit* q_copy_;           // where these cannot be used as they lie
  Unit* dout_copy_;
  State* dq_;       // dQ^T [panels][width][panel]
  State* lse_;      // [rows], log2 units
  State* lse_low_;  // [rows], what rounding took from lse_
  State* delta_;    // [rows]
  State* weights_;  // [stripe][panel], see weights()
  Unit* p_rows_;    // P^T [key block][pass / pair]: pairs of queries
  Unit* ds_rows_;   // dS^T, the same
  Unit* ds_lanes_;  // dS^T [key block / pair][panel]: pairs of keys
  Unit* k_copy_;    // where K and V cannot be used as they lie
  Unit* k_columns_;
  Unit* k_transposed_;
  Unit* v_copy_;
  State* dk_scratch_;  // [key block][width]
  State* dv_scratch_;  // [key block][v_width]
  State* dk_;          // of the key block in hand, see sum_keys_from()
  State* dv_;
  bool in_place_;
  State* row_;       // [lanes][width] rows being turned
  Scratch scratch_;  // owns all of these
};

}  // namespace
}  // namespace ring_attention::cpu
