// SPDX-License-Identifier: BSD-3-Clause
//
// Plain code that the kernels of every ISA share: scratch memory and the numbering of query rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "../params.h"

namespace ring_attention::cpu {

constexpr int64_t kMaxHeadDim = 256;

constexpr int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t round_up(int64_t x, int64_t y) { return divide_up(x, y) * y; }

// The working memory of one task, one allocation: `take` names the arrays and is called twice,
// first to count bytes, then to hand out pointers. Every array starts on a cache line.
class Scratch {
 public:
  template <typename Take>
  explicit Scratch(const Take& take) {
    take(*this);
    memory_ = static_cast<char*>(std::aligned_alloc(kAlign, bytes_));
    if (memory_ == nullptr) throw std::bad_alloc();
    bytes_ = 0;
    take(*this);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <typename T>
  void array(T*& pointer, int64_t count) {
    if (memory_ != nullptr) pointer = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign) + kAlign;
  }

 private:
  static constexpr int64_t kAlign = 64;
  char* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// Note [rows]. The query rows of one problem are those of all heads that share a K/V head, so that
// K and V are read once for the group, and few queries (decoding) still fill vectors. They are
// numbered head by head; where a head fills panels of its own, it starts a new one.
struct QueryRows {
  int64_t group, q_len, head_rows;

  QueryRows(const AttentionParams& p, int64_t panel)
      : group(p.heads / p.kv_heads),
        q_len(p.q_len),
        head_rows(p.q_len < panel ? p.q_len : round_up(p.q_len, panel)) {}

  int64_t count() const { return group * head_rows; }
  int64_t head(int64_t row) const { return row / head_rows; }  // within the group
  int64_t index(int64_t row) const { return row % head_rows; }
  // Rows beyond the last query of a head are padding: computed, never read or written.
  bool real(int64_t row) const { return row < count() && index(row) < q_len; }
};

// What a run of query rows sees of a K/V block: the union and the intersection of its intervals.
struct Extent {
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;            // some row sees
  int64_t full_begin = 0, full_end = std::numeric_limits<int64_t>::max();  // all rows see

  void add(int64_t row_begin, int64_t row_end) {
    begin = std::min(begin, row_begin);
    end = std::max(end, row_end);
    full_begin = std::max(full_begin, row_begin);
    full_end = std::min(full_end, row_end);
  }
  bool touches(int64_t from, int64_t to) const { return begin < to && from < end; }
  bool covers(int64_t from, int64_t to) const { return full_begin <= from && to <= full_end; }
};

// The interval of one query of one sample, clamped to the block. A row that sees nothing begins
// past every key, so that it never widens a union and always empties an intersection.
struct Interval {
  int64_t begin, end;
};

inline Interval interval_of(const KVBlock& block, int64_t n, int64_t b, int64_t i) {
  const Strides &bs = block.begin_stride, &es = block.end_stride;
  const int64_t begin =
      std::max<int64_t>(block.key_begin[n * bs.head + b * bs.batch + i * bs.row], 0);
  const int64_t end =
      std::min<int64_t>(block.key_end[n * es.head + b * es.batch + i * es.row], block.k_len);
  if (begin >= end) return {std::numeric_limits<int64_t>::max(), 0};
  return {begin, end};
}

}  // namespace ring_attention::cpu
