// SPDX-License-Identifier: BSD-3-Clause
//
// The forward for a few query rows (decoding, short chunks). Nothing of K and V is used often
// enough to be bound by arithmetic, so they stream by once, where they lie, as vectors along the
// head dim. One task is the rows that share a K/V head against a part of the keys:
//
//   load: Q, and the state (O, m, l)
//   for each K/V block, interval, key block that some row sees:
//     S = Q K^T: as many dot products at once as a vector has lanes
//     for each row:  n = max(m, S);  l, O *= exp2(m - n);  m = n;  P = exp2(S - m);  l += P
//     O += P V
//   write the state, or out = O / l and lse
//
// Memory: Q, O, and S and P V of one key block; none grows with the sequence.
#pragma once

#include "key_parts.h"
#include "operands.inl"

namespace ring_attention::cpu {
namespace {

template <typename Elem, typename V>
class FewRows {
  using State = StateOf<Elem>;
  using Rows = MultiplyAdd<Elem, V>;  // rows as what is summed
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kMostRows = 16, kKeyBlock = 128;
  static constexpr int64_t kAhead = 4096;  // bytes, see bytes_ahead()
  static constexpr int64_t kKeyGroup = 4;  // keys of one step of O += P V
  static constexpr State kInfinity = std::numeric_limits<State>::infinity();

 public:
  static bool suits(const ForwardParams& p) {
    const int64_t rows = p.heads / p.kv_heads * p.q_len;
    return 0 < rows && rows <= kMostRows;
  }

  static void run(const ForwardParams& p, const Parallel& parallel) {
    const int64_t problems = p.batch * p.kv_heads;
    KeyParts parts(p, kKeyBlock, problems);
    parallel(problems * parts.count(), [&](int64_t task) {
      const int64_t part = task % parts.count(), problem = task / parts.count();
      FewRows kernel(parts.params(part), problem / p.kv_heads, problem % p.kv_heads);
      kernel.fold(parts.begin(part), parts.end(part));
    });
    parts.combine(parallel);
  }

 private:
  FewRows(const ForwardParams& params, int64_t b, int64_t kv_head)
      : p_(params),
        batch_(b),
        kv_head_(kv_head),
        query_rows_(params, kMostRows + 1),
        rows_(query_rows_.count()),
        width_(round_up(params.head_dim, kLanes)),
        v_width_(round_up(params.v_head_dim, kLanes)),
        scratch_([&](Scratch& scratch) { take(scratch); }) {}

  void take(Scratch& scratch) {
    scratch.array(q_, rows_ * width_);
    scratch.array(acc_, rows_ * v_width_);
    scratch.array(block_acc_, rows_ * v_width_);
    scratch.array(scores_, rows_ * kKeyBlock);
    scratch.array(k_copy_, kKeyBlock * width_);
    scratch.array(v_copy_, kKeyBlock * v_width_);
  }

  // Folds the keys [keys_begin, keys_end), counted over all blocks.
  void fold(int64_t keys_begin, int64_t keys_end) {
    load();
    int64_t offset = 0;
    for (int64_t i = 0; i < p_.num_blocks; ++i) {
      const KVBlock& block = p_.blocks[i];
      for (int64_t n = 0; n < block.intervals; ++n) {
        const Extent extent = see(block, n);
        const int64_t begin = std::max(extent.begin, keys_begin - offset);
        const int64_t end = std::min(extent.end, keys_end - offset);
        for (int64_t from = begin / kKeyBlock * kKeyBlock; from < end; from += kKeyBlock) {
          fold_keys(block, from, extent);
        }
      }
      offset += round_up(block.k_len, kKeyBlock);
    }
    if (p_.last) {
      write_output();
    } else {
      write_state();
    }
  }

  void fold_keys(const KVBlock& block, int64_t from, const Extent& extent) {
    bool seen[kKeyBlock];
    mark_seen(from, extent, seen);
    const Elem* keys[kKeyBlock];
    const Elem* values[kKeyBlock];
    point(block.k, block.k_stride, from, seen, keys);
    point(block.v, block.v_stride, from, seen, values);
    begin_ = std::max<int64_t>(extent.begin - from, 0);
    end_ = std::min(extent.end - from, kKeyBlock);
    ahead_ = bytes_ahead(p_.head_dim, block.k_stride.row);
    as_vectors(keys, p_.head_dim, width_, k_copy_, [&](const auto* rows) { score(rows); });
    for (int64_t r = 0; r < rows_; ++r) softmax(r, from);
    ahead_ = bytes_ahead(p_.v_head_dim, block.v_stride.row);
    as_vectors(values, p_.v_head_dim, v_width_, v_copy_, [&](const auto* rows) { add(rows); });
  }

  // ---- what the rows see

  Extent see(const KVBlock& block, int64_t n) {
    const Intervals intervals(block, n, batch_);
    Extent extent;
    for (int64_t r = 0; r < rows_; ++r) {
      seen_[r] = intervals.of(query_rows_.index(r));
      extent.add(seen_[r].begin, seen_[r].end);
    }
    return extent;
  }

  void mark_seen(int64_t from, const Extent& extent, bool* seen) const {
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      seen[j] = extent.begin <= from + j && from + j < extent.end;
      if (extent.whole || !seen[j]) continue;
      seen[j] = std::any_of(seen_, seen_ + rows_, [&](const Interval& row) {
        return row.begin <= from + j && from + j < row.end;
      });
    }
  }

  // The rows of a key block. One that nobody sees reads as zeros: 0 NaN is NaN.
  void point(const void* data, const Strides& stride, int64_t from, const bool* seen,
             const Elem** rows) const {
    static constexpr Elem kZeros[kMaxHeadDim] = {};
    const auto* first = static_cast<const Elem*>(data) + batch_ * stride.batch +
                        kv_head_ * stride.head + from * stride.row;
    for (int64_t j = 0; j < kKeyBlock; ++j) rows[j] = seen[j] ? first + j * stride.row : kZeros;
  }

  // Calls visit with the rows themselves, or with copies where the last vector would be too long.
  template <typename Visit>
  void as_vectors(const Elem* const* rows, int64_t dim, int64_t width, State* copy,
                  const Visit& visit) {
    if (dim == width) return visit(rows);
    const State* copies[kKeyBlock];
    for (int64_t j = begin_ / kLanes * kLanes; j < round_up(end_, kLanes); ++j) {
      fetch(rows[j], dim);
      copy_row<Rows>(rows[j], dim, width, copy + j * width);
      copies[j] = copy + j * width;
    }
    ahead_ = 0;  // the copies are here
    visit(static_cast<const State* const*>(copies));
  }

  // How far before its use a row is asked for: far enough for memory, and over the end of a page,
  // where the processor's own prefetching stops. K's rows of the next key block too: they wait in
  // the L2 cache while V streams by.
  static int64_t bytes_ahead(int64_t dim, int64_t stride) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(Elem));
    return divide_up(kAhead, dim * kBytes) * stride * kBytes;
  }

  template <typename Row>
  RA_INLINE void fetch(const Row* row, int64_t count) const {
    for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(Row)); at += kCacheLine) {
      __builtin_prefetch(
          reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + ahead_ + at));
    }
  }

  // ---- one key block

  // Calls visit<n>(first) for all rows, by four, two or one.
  template <typename Visit>
  void by_rows(const Visit& visit) const {
    int64_t r = 0;
    if constexpr (kLanes >= 4) {
      for (; r + 4 <= rows_; r += 4) visit.template operator()<4>(r);
    }
    for (; r + 2 <= rows_; r += 2) visit.template operator()<2>(r);
    if (r < rows_) visit.template operator()<1>(r);
  }

  // S = Q K^T
  template <typename Row>
  void score(const Row* const* keys) {
    by_rows([&]<int kRows>(int64_t r) { score_rows<kRows>(r, keys); });
  }

  template <int kRows, typename Row>
  __attribute__((noinline)) void score_rows(int64_t first, const Row* const* keys) {
    constexpr int kKeys = kLanes / kRows;
    alignas(64) State products[kLanes];
    const int64_t end = end_;
    for (int64_t j = begin_ / kKeys * kKeys; j < end; j += kKeys) {
      if (first == 0) {
        for (int s = 0; s < kKeys; ++s) fetch(keys[j + s], width_);
      }
      V sum[kLanes];  // [rows][keys]
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = V::zero();
      for (int64_t d = 0; d < width_; d += kLanes) {
        V q[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          q[r] = V::load(q_ + (first + r) * width_ + d);
          pin(q[r]);  // for all keys, or every multiply-add would load it again
        }
#pragma GCC unroll 16
        for (int s = 0; s < kKeys; ++s) {
          const V key = V::load(keys[j + s] + d);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r * kKeys + s] = fma(q[r], key, sum[r * kKeys + s]);
        }
      }
      sums_of_lanes(sum).store(products);
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(scores_ + (first + r) * kKeyBlock + j, products + r * kKeys,
                    kKeys * sizeof(State));
      }
    }
  }

  // S of a row becomes P; its m and l move on, and O with them.
  void softmax(int64_t r, int64_t from) {
    alignas(64) State lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<State>(i);
    const V lane = V::load(lanes), none = V::set(-kInfinity);
    const V low = V::set(static_cast<State>(std::max<int64_t>(seen_[r].begin - from, 0)));
    const V high = V::set(static_cast<State>(std::min(seen_[r].end - from, kKeyBlock)));
    State* row = scores_ + r * kKeyBlock;
    const int64_t begin = begin_ / kLanes * kLanes, end = round_up(end_, kLanes);
    V most = none;
    for (int64_t j = begin; j < end; j += kLanes) {
      const V key = lane + V::set(static_cast<State>(j));
      const V score = select(within(key, low, high), to_log2_units(V::load(row + j)), none);
      score.store(row + j);
      most = max(score, most);
    }
    most.store(lanes);
    raise_reference(r, *std::max_element(lanes, lanes + kLanes));
    // Nothing seen yet, or only -inf: -inf - -inf would be NaN.
    const V m = V::set(m_[r] == -kInfinity ? State{0} : m_[r]);
    V sum = V::zero();
    for (int64_t j = begin; j < end; j += kLanes) {
      const V prob = exp2<Rows::kExpTerms>(V::load(row + j) - m);
      prob.store(row + j);
      sum = sum + prob;
    }
    sum.store(lanes);
    State total = 0;
    for (const State lane_sum : lanes) total += lane_sum;
    l_[r] += total;
  }

  V to_log2_units(V product) const {
    const State scale = static_cast<State>(p_.scale), cap = static_cast<State>(p_.softcap);
    if (cap == 0) return product * V::set(scale * static_cast<State>(kLog2e));
    return V::set(cap * static_cast<State>(kLog2e)) * tanh(product * V::set(scale / cap));
  }

  void raise_reference(int64_t r, State most) {
    if (!(most > m_[r])) return;
    const V factor = V::set(std::exp2(m_[r] - most));
    State* acc = acc_ + r * v_width_;
    for (int64_t d = 0; d < v_width_; d += kLanes) (V::load(acc + d) * factor).store(acc + d);
    l_[r] *= std::exp2(m_[r] - most);
    m_[r] = most;
  }

  // O += P V, a few keys at a time: memory is read in order, row by row. The sums of the key block
  // are added to O at its end, so that the error does not grow with the number of steps.
  template <typename Row>
  void add(const Row* const* values) {
    constexpr int kVecs = kLanes == 16 ? 4 : 2;  // registers
    std::memset(block_acc_, 0, rows_ * v_width_ * sizeof *block_acc_);
    for (int64_t j = begin_; j < end_; j += kKeyGroup) {
      const int64_t end = std::min(j + kKeyGroup, end_);
      for (int64_t i = j; i < end; ++i) fetch(values[i], v_width_);
      by_rows([&]<int kRows>(int64_t r) {
        int64_t d = 0;
        for (; d + kVecs * kLanes <= v_width_; d += kVecs * kLanes) {
          add_rows<kRows, kVecs>(r, d, j, end, values);
        }
        for (; d < v_width_; d += kLanes) add_rows<kRows, 1>(r, d, j, end, values);
      });
    }
    for (int64_t i = 0; i < rows_ * v_width_; i += kLanes) {
      (V::load(acc_ + i) + V::load(block_acc_ + i)).store(acc_ + i);
    }
  }

  template <int kRows, int kVecs, typename Row>
  RA_INLINE void add_rows(int64_t first, int64_t d, int64_t begin, int64_t end,
                          const Row* const* values) {
    V sum[kRows][kVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = V::zero();
    }
    const State* probs = scores_ + first * kKeyBlock;
    for (int64_t j = begin; j < end; ++j) {
      V value[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) value[v] = V::load(values[j] + d + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V prob = V::set(probs[r * kKeyBlock + j]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(prob, value[v], sum[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      State* acc = block_acc_ + (first + r) * v_width_ + d;
      for (int v = 0; v < kVecs; ++v) {
        (V::load(acc + v * kLanes) + sum[r][v]).store(acc + v * kLanes);
      }
    }
  }

  // ---- state and output

  int64_t head(int64_t r) const { return kv_head_ * query_rows_.group + query_rows_.head(r); }
  int64_t offset(int64_t r, const Strides& stride) const {
    return batch_ * stride.batch + head(r) * stride.head + query_rows_.index(r) * stride.row;
  }
  // Of one number per query, contiguous [batch, heads, q_len].
  int64_t flat(int64_t r) const { return offset(r, {p_.heads * p_.q_len, p_.q_len, 1}); }

  void load() {
    std::memset(acc_, 0, rows_ * v_width_ * sizeof *acc_);
    for (int64_t r = 0; r < rows_; ++r) {
      copy_row<Rows>(static_cast<const Elem*>(p_.q) + offset(r, p_.q_stride), p_.head_dim, width_,
                     q_ + r * width_);
      m_[r] = -kInfinity;
      l_[r] = 0;
      if (p_.first) {
        start(r);
      } else {
        carry_on(r);
      }
    }
  }

  void start(int64_t r) {
    if (p_.sinks == nullptr) return;
    const State sink = static_cast<const State*>(p_.sinks)[head(r)] * static_cast<State>(kLog2e);
    if (sink == -kInfinity) return;
    m_[r] = sink;
    l_[r] = 1;
  }

  void carry_on(int64_t r) {
    l_[r] = static_cast<const State*>(p_.l)[flat(r)];
    if (l_[r] != 0) m_[r] = static_cast<const State*>(p_.m)[flat(r)];
    std::memcpy(acc_ + r * v_width_, static_cast<const State*>(p_.acc) + flat(r) * p_.v_head_dim,
                p_.v_head_dim * sizeof *acc_);
  }

  void write_state() {
    for (int64_t r = 0; r < rows_; ++r) {
      static_cast<State*>(p_.m)[flat(r)] = m_[r];
      static_cast<State*>(p_.l)[flat(r)] = l_[r];
      std::memcpy(static_cast<State*>(p_.acc) + flat(r) * p_.v_head_dim, acc_ + r * v_width_,
                  p_.v_head_dim * sizeof *acc_);
    }
  }

  void write_output() {
    for (int64_t r = 0; r < rows_; ++r) {
      const bool empty = l_[r] == 0;
      scale_row<Rows>(acc_ + r * v_width_, p_.v_head_dim, empty ? State{0} : State{1} / l_[r],
                      static_cast<Elem*>(p_.out) + offset(r, p_.out_stride));
      static_cast<State*>(p_.lse)[flat(r)] = log_sum_exp(m_[r], l_[r]);
    }
  }

  const ForwardParams& p_;
  const int64_t batch_, kv_head_;
  const QueryRows query_rows_;
  const int64_t rows_;
  const int64_t width_, v_width_;  // the head dims in whole vectors
  Interval seen_[kMostRows];       // of the block in hand
  int64_t begin_, end_;            // of the key block in hand: what some row sees
  int64_t ahead_;                  // bytes, see bytes_ahead()
  State m_[kMostRows], l_[kMostRows];
  State* q_;          // [rows][width]
  State* acc_;        // O [rows][v_width]
  State* block_acc_;  // what the key block in hand adds to it
  State* scores_;     // S, then P [rows][key block]
  State* k_copy_;     // where rows cannot be used as they lie
  State* v_copy_;
  Scratch scratch_;  // owns these
};

}  // namespace
}  // namespace ring_attention::cpu
