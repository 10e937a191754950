// SPDX-License-Identifier: BSD-3-Clause
//
// The forward kernel. One task folds all K/V blocks into one tile of query rows:
//
//   for each K/V block, interval, key block that the tile sees:
//     K as it is, V's columns
//     for each panel of the tile that sees the key block:
//       the first time: load Q^T, and the state (O^T, m, l)
//       for each register tile of S^T = K Q^T:  mask;  P^T = exp2(S^T - m);  l += P^T
//       O^T += V^T P^T
//   write the state, or out = O / l and lse
//
// Scores are transposed: keys are rows, queries are lanes, so that maximum, sum and rescaling are
// per lane and nothing is ever reduced across lanes; exponentials are taken of sums that are still
// in registers. A row's result depends on its own interval only: key blocks and tiles lie on a
// fixed grid, and what a row does not see adds exact zeros.
//
// Note [lazy maximum]. P is computed with the reference the row already has. The first reference
// is the largest score of the first register tile in which the row sees a key. A key block whose
// sum exceeds 2^24 is folded again with its own maximum as the reference, for the rows concerned
// only. Ordinary data never folds twice, and max - 24 <= m <= max holds after each block.
//
// Note [split keys]. Few query rows (decoding) are few tasks. Then the keys are cut into parts, by
// shape, each part is folded into a state of its own, and the states are combined in order.
//
// Memory: Q^T and O^T of a tile, V's columns and P of one key block; none grows with the sequence.
#pragma once

#include "fetcher.inl"
#include "few_rows.inl"
#include "key_parts.h"
#include "tile_state.inl"

namespace ring_attention::cpu {
namespace {

template <typename Arch>
class Forward {
  using Elem = typename Arch::Elem;
  using State = typename Arch::State;
  using Unit = typename Arch::Unit;
  using V = typename Arch::V;
  using Place = typename Fetcher<Arch>::Place;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPair = Arch::kPair;
  static constexpr int64_t kTasks = 16;  // for all threads to work
  static constexpr State kMostSum = 0x1p24;
  static constexpr State kInfinity = std::numeric_limits<State>::infinity();

 public:
  static void run(const ForwardParams& p, const Parallel& parallel) {
    if (FewRows<Elem, V>::suits(p)) return FewRows<Elem, V>::run(p, parallel);
    const TileShape shape = Arch::forward_shape(std::max(p.head_dim, p.v_head_dim));
    const int64_t rows = QueryRows(p, shape.panel).count(), problems = p.batch * p.kv_heads;
    const int64_t panels = problems * divide_up(rows, shape.panel);
    // As many panels as share what is read and packed of a key block, but few enough for all
    // threads to work: on tiles, or on parts of the keys, whose states have to be combined.
    const int64_t tasks = panels * KeyParts::most(p, shape.key_block);
    const int64_t tile_rows =
        shape.panel * std::max(std::clamp<int64_t>(panels / kTasks, 1, shape.panels),
                               std::clamp<int64_t>(tasks / kTasks, 1, shape.least_panels));
    const int64_t tiles = divide_up(rows, tile_rows);
    KeyParts parts(p, shape.key_block, problems * tiles);
    const int64_t count = problems * tiles * parts.count();
    const auto place_of = [&](int64_t task) {
      const int64_t problem = task / parts.count() % problems;
      // Causal rows are the heavier the later they come: these first.
      const int64_t tile = tiles - 1 - task / parts.count() / problems;
      return Place{problem / p.kv_heads, problem % p.kv_heads, tile * tile_rows};
    };
    parallel(count, [&](int64_t task) {
      const int64_t part = task % parts.count();
      const Place place = place_of(task);
      Forward kernel(parts.params(part), shape, tile_rows, place);
      const int64_t next = task + parallel.threads;  // this thread's, if threads take turns
      if (parts.count() == 1 && next < count) kernel.fetcher_.set_next_tile(place_of(next));
      kernel.fold(place.row, std::min(tile_rows, rows - place.row), parts.begin(part),
                  parts.end(part));
    });
    parts.combine(parallel);
  }

 private:
  Forward(const ForwardParams& params, const TileShape& shape, int64_t tile_rows,
          const Place& place)
      : p_(params),
        key_block_(shape.key_block),
        kv_head_(place.kv_head),
        units_(round_up(params.head_dim, Arch::kDepthStep) / kPair),
        score_units_(params),
        tile_(params, shape.panel, place.batch, place.kv_head),
        state_(params, tile_),
        fetcher_(params, tile_, place.kv_head, shape.key_block),
        scratch_([&](Scratch& scratch) { take(scratch, tile_rows); }) {}

  void take(Scratch& scratch, int64_t tile_rows) {
    const int64_t panel = tile_.panel, dim = std::max(p_.head_dim, p_.v_head_dim);
    const int64_t width = round_up(dim, Arch::kWidthStep);
    tile_.take(scratch, tile_rows);
    state_.take(scratch, tile_rows);
    scratch.array(loaded_, tile_rows / panel);
    scratch.array(q_, tile_rows * round_up(units_, kLanes));
    scratch.array(block_l_, panel);
    scratch.array(p_units_, key_block_ / kPair * panel);
    scratch.array(k_copy_, key_block_ * width / kPair);
    scratch.array(v_copy_, key_block_ * width / kPair);
    scratch.array(v_transposed_, Arch::kTransposeColumns ? key_block_ * width / kPair : 0);
  }

  // Folds the keys [keys_begin, keys_end), counted over all blocks, into a tile of rows.
  void fold(int64_t first, int64_t count, int64_t keys_begin, int64_t keys_end) {
    [[maybe_unused]] const typename Arch::Session session;
    tile_.move_to(first, count);
    tile_.rows_of(p_.q, p_.q_stride);
    std::fill_n(loaded_, tile_.panels(), false);
    int64_t offset = 0;
    for (int64_t i = 0; i < p_.num_blocks; ++i) {
      const KVBlock& block = p_.blocks[i];
      for (int64_t n = 0; n < block.intervals; ++n) {
        tile_.see(block, n);
        const int64_t begin = std::max(tile_.span.begin, keys_begin - offset);
        const int64_t end = std::min(tile_.span.end, keys_end - offset);
        for (int64_t from = begin / key_block_ * key_block_; from < end; from += key_block_) {
          fold_keys(block, n, from);
        }
      }
      offset += round_up(block.k_len, key_block_);
    }
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      if (loaded_[u]) {
        state_.write(u);
      } else {
        state_.pass(u);
      }
    }
  }

  // One key block, of intervals n, into every panel that sees it.
  void fold_keys(const KVBlock& block, int64_t n, int64_t from) {
    const int64_t count = std::min(key_block_, block.k_len - from);
    const int64_t touching = tile_.touching(from, count);
    if (touching == 0) return;
    bool marks[Arch::kMaxKeyBlock];
    const bool* unseen = tile_.mark_unseen(from, count, marks);
    const int64_t begin = tile_.span.begin - from, end = tile_.span.end - from;
    KeyBlock<Arch> keys;
    keys.set(first_row(block.k, block.k_stride, from), block.k_stride.row, count, begin, end,
             unseen);
    const Operand<Unit> k = keys.as_rows(p_.head_dim, k_copy_);
    keys.set(first_row(block.v, block.v_stride, from), block.v_stride.row, count, begin, end,
             unseen);
    const Operand<Unit> v = keys.as_columns(p_.v_head_dim, v_copy_, v_transposed_);
    fetcher_.begin_keys(block, n, from + key_block_, touching);
    for (int64_t u = 0; u < tile_.panels(); ++u) {
      if (!tile_.extents[u].touches(from, from + count)) continue;
      const KeyRange<Arch> range(tile_.extents[u], from, keys.padded, tile_.lanes(u));
      fetcher_.begin_panel(u, range, !loaded_[u]);
      if (!loaded_[u]) load(u);
      if (!tile_.extents[u].covers(from, from + keys.padded) ||
          !panel_of(u, from, range).has_reference(0, tile_.lanes(u))) {
        tile_.bound(u, from, count);
      }
      softmax(u, k, from, range);
      accumulate(u, v, range);
    }
  }

  void load(int64_t u) {
    const int64_t panel = tile_.panel;
    Unit* q = q_of(u);
    transpose_rows<Arch>(tile_.source + u * panel, tile_.lanes(u), p_.head_dim, units_, q, panel);
    score_units_.scale_queries(q, panel * units_);
    state_.load(u);
    loaded_[u] = true;
  }

  Unit* q_of(int64_t u) const { return q_ + u * tile_.panel * round_up(units_, kLanes); }

  const Elem* first_row(const void* data, const Strides& stride, int64_t from) const {
    return static_cast<const Elem*>(data) + tile_.batch * stride.batch + kv_head_ * stride.head +
           from * stride.row;
  }

  // ---- one panel, one key block

  // P^T of the panel, and l += its sums, see Note [lazy maximum].
  void softmax(int64_t u, Operand<Unit> k, int64_t from, KeyRange<Arch> range) {
    do {
      std::memset(block_l_, 0, tile_.panel * sizeof *block_l_);
      if (p_.softcap != 0.0) {
        probabilities<true>(u, k, from, range);
      } else {
        probabilities<false>(u, k, from, range);
      }
    } while (raise_reference(u, k, from, range));
    State* l = state_.l + u * tile_.panel;
    for (int64_t i = 0; i < tile_.lanes(u); i += kLanes) {
      (V::load(l + i) + V::load(block_l_ + i)).store(l + i);
    }
  }

  // What a tile of scores is met with. Kept by value in the loops over tiles: members would be
  // read again after every store of a vector.
  struct Panel {
    State* m;
    State* sums;  // block_l_
    const State* low;
    const State* high;
    Unit* probs;  // of the first key of the range
    int64_t row;  // of probs
    int64_t first_key, full_begin, full_end;
    ScoreUnits<Arch> units;

    bool has_reference(int64_t lane, int64_t count) const {
      bool found = true;
      for (int64_t i = lane; i < lane + count; i += kLanes) {
        found &= !V::any(less(V::load(m + i), V::set(-std::numeric_limits<State>::max())));
      }
      return found;
    }
  };

  Panel panel_of(int64_t u, int64_t from, KeyRange<Arch> range) const {
    const int64_t panel = tile_.panel, first = from + range.begin;
    return {.m = state_.m + u * panel,
            .sums = block_l_,
            .low = tile_.low,
            .high = tile_.high,
            .probs = p_units_ + range.begin / kPair * panel,
            .row = panel,
            .first_key = range.begin,
            .full_begin = tile_.extents[u].full_begin - first,
            .full_end = tile_.extents[u].full_end - first,
            .units = score_units_};
  }

  // Careful until every lane has a reference: the first tile sees to it, if all see one of its
  // keys.
  template <bool kCapped>
  void probabilities(int64_t u, Operand<Unit> k, int64_t from, KeyRange<Arch> range) {
    const Panel panel = panel_of(u, from, range);
    const int64_t width = tile_.lanes(u);
    const int64_t first = panel.has_reference(0, width) ? 0 : 1;
    for_stretches(range.count(), std::max(panel.full_begin, first), panel.full_end, range.grid,
                  [&]<bool kMasked>(int64_t begin, int64_t end) {
                    const Operand<Unit> keys = k.at(range.begin + begin, 0);
                    if (kMasked || !panel.has_reference(0, width)) {
                      fold_scores<kCapped, true>(u, keys, panel, begin, end);
                    } else {
                      fold_scores<kCapped, false>(u, keys, panel, begin, end);
                    }
                  });
  }

  // The keys [begin, end) of a range.
  template <bool kCapped, bool kCareful>
  __attribute__((noinline)) void fold_scores(int64_t u, Operand<Unit> keys, Panel panel,
                                             int64_t begin, int64_t end) {
    for_tiles<Arch, 2>(
        end - begin, tile_.lanes(u), units_, keys, {q_of(u), tile_.panel},
        [&]<int kRows, int kVecs>(V(&scores)[kRows][kVecs], int64_t i, int64_t lane)
            __attribute__((always_inline)) {
              to_log2_units<kCapped>(scores, panel.units);
              softmax_tile<kCareful>(scores, panel, begin + i, lane);
            },
        [&]<int kRows, int kVecs>(int64_t i, int64_t) __attribute__((always_inline)) {
          fetcher_.template fetch<kRows>(panel.first_key + begin + i, begin + i);
        });
  }

  // P and its sums from one tile of scores. With kCareful some lane may not see some key,
  // or have no reference yet.
  template <bool kCareful, int kRows, int kVecs>
  static RA_INLINE void softmax_tile(const V (&scores)[kRows][kVecs], const Panel& panel, int64_t i,
                                     int64_t lane) {
    if (kCareful && !panel.has_reference(lane, kVecs * kLanes)) {
      first_reference(scores, panel, i, lane);
    }
    const int64_t key = panel.first_key + i;
    Unit* probs[kRows / kPair];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; r += kPair) {
      probs[r / kPair] = panel.probs + (i + r) / kPair * panel.row + lane;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = lane + v * kLanes;
      V low = V::zero(), high = V::zero(), m = V::load(panel.m + at);
      if constexpr (kCareful) {
        low = V::load(panel.low + at), high = V::load(panel.high + at);
        // Not yet: -inf - -inf would be NaN for a row that sees nothing, or only -inf.
        m = select(less(V::set(-kInfinity), m), m, V::zero());
      }
      V sum = V::load(panel.sums + at);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; r += 2) {
        V prob[2] = {scores[r][v] - m, scores[r + 1][v] - m};
        exp2_both<Arch::kExpTerms, false>(prob);
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          if constexpr (kCareful) {
            prob[s] = keep_visible(key + r + s, low, high, prob[s], V::zero());
          }
          sum = sum + prob[s];
        }
#pragma GCC unroll 2
        for (int s = 0; s < 2; s += kPair) {
          Arch::store_lanes(prob + s, probs[(r + s) / kPair] + v * kLanes);
        }
      }
      sum.store(panel.sums + at);
    }
  }

  // Lanes without a reference take the largest score of the tile among the keys they see.
  template <int kRows, int kVecs>
  static RA_INLINE void first_reference(const V (&scores)[kRows][kVecs], const Panel& panel,
                                        int64_t i, int64_t lane) {
    const V none = V::set(-kInfinity);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = lane + v * kLanes;
      const V low = V::load(panel.low + at), high = V::load(panel.high + at);
      V most = none;
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const int64_t key = panel.first_key + i + r;
        most = max(keep_visible(key, low, high, scores[r][v], most), most);
      }
      const V m = V::load(panel.m + at);
      select(less(none, m), m, most).store(panel.m + at);
    }
  }

  // From products to scores.
  template <bool kCapped, int kRows, int kVecs>
  static RA_INLINE void to_log2_units(V (&scores)[kRows][kVecs], const ScoreUnits<Arch>& units) {
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        scores[r][v] = units.template of<kCapped>(scores[r][v]);
        if constexpr (kCapped) scores[r][v] = V::set(units.height) * scores[r][v];
      }
    }
  }

  // Rows whose sum is too large for their reference move it to the maximum of the block and shrink
  // what they had. True if there were any: the block is to be folded again.
  bool raise_reference(int64_t u, Operand<Unit> k, int64_t from, KeyRange<Arch> range) {
    const int64_t panel = tile_.panel, width = tile_.lanes(u);
    bool any = false;
    for (int64_t i = 0; i < width; i += kLanes) {
      any |= V::any(less(V::set(kMostSum), V::load(block_l_ + i)));
    }
    if (!any) return false;
    bool exceeded[Arch::kMaxPanel];
    for (int64_t i = 0; i < width; ++i) exceeded[i] = block_l_[i] > kMostSum;
    maximum(u, k, from, range);
    for (int64_t i = 0; i < width; ++i) {
      State& m = state_.m[u * panel + i];
      const State raised = exceeded[i] ? std::max(m, block_l_[i]) : m;
      block_l_[i] = raised == m ? State{1} : std::exp2(m - raised);
      m = raised;
      state_.l[u * panel + i] *= block_l_[i];
    }
    for (int64_t d = 0; d < state_.v_rows; ++d) {
      State* acc = state_.acc + (u * state_.v_rows + d) * panel;
      for (int64_t i = 0; i < width; i += kLanes) {
        (V::load(acc + i) * V::load(block_l_ + i)).store(acc + i);
      }
    }
    return true;
  }

  // Leaves in block_l_ each row's largest score, in log2 units, among the keys it sees.
  __attribute__((noinline)) void maximum(int64_t u, Operand<Unit> k, int64_t from,
                                         KeyRange<Arch> range) {
    const Panel panel = panel_of(u, from, range);
    const int64_t width = tile_.lanes(u);
    const bool capped = p_.softcap != 0.0;
    std::fill_n(block_l_, width, -kInfinity);
    tile_.bound(u, from, key_block_);
    for_tiles<Arch, 2>(range.count(), width, units_, k.at(range.begin, 0), {q_of(u), tile_.panel},
                       [&]<int kRows, int kVecs>(V(&scores)[kRows][kVecs], int64_t i, int64_t lane)
                           __attribute__((always_inline)) {
                             if (capped) {
                               to_log2_units<true>(scores, panel.units);
                             } else {
                               to_log2_units<false>(scores, panel.units);
                             }
                             maximum_tile(scores, panel, i, lane);
                           });
  }

  template <int kRows, int kVecs>
  static RA_INLINE void maximum_tile(const V (&scores)[kRows][kVecs], const Panel& panel, int64_t i,
                                     int64_t lane) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = lane + v * kLanes;
      const V low = V::load(panel.low + at), high = V::load(panel.high + at);
      V most = V::load(panel.sums + at);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const int64_t key = panel.first_key + i + r;
        most = max(keep_visible(key, low, high, scores[r][v], most), most);
      }
      most.store(panel.sums + at);
    }
  }

  // O^T += V^T P^T.
  void accumulate(int64_t u, Operand<Unit> v, KeyRange<Arch> range) {
    const int64_t panel = tile_.panel, key = range.sum_begin / kPair;
    multiply_into<Arch>(round_up(p_.v_head_dim, Arch::kDepthStep), tile_.lanes(u),
                        range.sum_count() / kPair, v.at(0, key), {p_units_ + key * panel, panel},
                        state_.acc + u * state_.v_rows * panel, panel);
  }

  const ForwardParams& p_;
  const int64_t key_block_;
  const int64_t kv_head_;
  const int64_t units_;  // of q and k along head_dim
  const ScoreUnits<Arch> score_units_;
  QueryTile<Arch> tile_;
  TileState<Arch> state_;
  Fetcher<Arch> fetcher_;
  bool* loaded_;    // [panels]
  Unit* q_;         // Q^T [panels][units, padded][panel], scaled
  State* block_l_;  // [panel] sums of the key block in hand
  Unit* p_units_;   // P^T [key block / pair][panel]
  Unit* k_copy_;    // where K and V cannot be used as they lie
  Unit* v_copy_;
  Unit* v_transposed_;
  Scratch scratch_;  // owns all of these
};

}  // namespace
}  // namespace ring_attention::cpu
