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
#include <utility>

#include "../params.h"
#include "logarithms.h"

namespace ring_attention::cpu {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kCacheLine = 64;

constexpr int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t round_up(int64_t x, int64_t y) { return divide_up(x, y) * y; }

// The working memory of one task: `take` names the arrays and is called twice, first to count
// bytes, then to hand out pointers. A thread keeps its memory from task to task (a few MB, whatever
// the sequence length): fresh pages would cost more than what is computed in them.
//
// Arrays start on a cache line, and far from one another modulo a page: a load that shares its low
// twelve address bits with a store just before it waits for that store.
class Scratch {
 public:
  template <typename Take>
  explicit Scratch(const Take& take) : memory_(std::move(kept())) {
    take(*this);
    if (memory_.bytes < bytes_) memory_ = Memory(round_up(bytes_, kPage));
    start_ = memory_.data;
    bytes_ = skew_ = 0;
    take(*this);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { kept() = std::move(memory_); }

  template <typename T>
  void array(T*& pointer, int64_t count) {
    const int64_t start = round_up(bytes_, kPage) + skew_;
    pointer = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + start);
    bytes_ = start + count * static_cast<int64_t>(sizeof(T));
    skew_ = (skew_ + kSkew) % kPage;
  }

 private:
  static constexpr int64_t kPage = 4096, kSkew = 2304;

  struct Memory {
    char* data = nullptr;
    int64_t bytes = 0;

    Memory() = default;
    explicit Memory(int64_t size)
        : data(static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(size)))),
          bytes(size) {
      if (data == nullptr) throw std::bad_alloc();
    }
    Memory(Memory&& other) noexcept
        : data(std::exchange(other.data, nullptr)), bytes(std::exchange(other.bytes, 0)) {}
    Memory& operator=(Memory&& other) noexcept {
      std::swap(data, other.data);
      std::swap(bytes, other.bytes);
      return *this;
    }
    ~Memory() { std::free(data); }
  };

  // Moved out while a task has it, so that a task within a task would get its own.
  static Memory& kept() {
    static thread_local Memory memory;
    return memory;
  }

  Memory memory_;
  char* start_ = nullptr;  // null while counting
  int64_t bytes_ = 0, skew_ = 0;
};

// Note [tile shapes]. Chosen per ISA and head dim, by measurement. The lanes of a panel (head_dim x
// panel units) are read once per row tile, from half of the L1 cache if they fit there; a panel
// that is narrower than the widest register tile costs more than to read it from the L2 cache,
// where a tile of the backward, its operands and dQ, must fit. Key blocks are multiples of the
// register tile's rows.
struct TileShape {
  int64_t panel;             // query rows that are the lanes of one product
  int64_t key_block;         // keys of one pass
  int64_t panels;            // panels that share the packing of a key block
  int64_t least_panels = 1;  // forward: but no fewer, if that takes parts of the keys as tasks
  int64_t pass = 1;          // backward: panels whose rows one sum of dK and dV takes
  int64_t stripe = 0;        // backward: keys whose S and dP are formed in turn
};

// Note [rows]. The query rows of one problem are those of all heads that share a K/V head, so that
// K and V are read once for the group, and few queries (decoding) still fill vectors. They are
// numbered head by head; where a head fills panels of its own, it starts a new one, and the rows
// beyond its last query are padding: computed, never read or written.
struct QueryRows {
  int64_t group, q_len, head_rows;

  QueryRows(const AttentionParams& p, int64_t panel)
      : group(p.heads / p.kv_heads),
        q_len(p.q_len),
        head_rows(p.q_len < panel ? p.q_len : round_up(p.q_len, panel)) {}

  int64_t count() const { return group * head_rows; }
  int64_t head(int64_t row) const { return row / head_rows; }  // within the group
  int64_t index(int64_t row) const { return row % head_rows; }
};

// What a run of query rows sees of a K/V block: the union and the intersection of its intervals.
struct Span {
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;  // some row sees

  bool touches(int64_t from, int64_t to) const { return begin < to && from < end; }
};
struct Extent : Span {
  int64_t full_begin = 0, full_end = std::numeric_limits<int64_t>::max();  // all rows see
  bool whole = true;  // each key of [begin, end) is seen by some row; false: perhaps not

  void add(int64_t row_begin, int64_t row_end) {
    if (row_begin < row_end && begin < end) whole &= row_begin <= end && begin <= row_end;
    begin = std::min(begin, row_begin);
    end = std::max(end, row_end);
    full_begin = std::max(full_begin, row_begin);
    full_end = std::min(full_end, row_end);
  }
  bool covers(int64_t from, int64_t to) const { return full_begin <= from && to <= full_end; }
};

// The interval of one query of one sample, clamped to the block. A row that sees nothing begins
// past every key, so that it never widens a union and always empties an intersection.
struct Interval {
  int64_t begin, end;
};

// Intervals n of a block for the queries of sample b.
class Intervals {
 public:
  Intervals(const KVBlock& block, int64_t n, int64_t b)
      : begin_(block.key_begin + n * block.begin_stride.head + b * block.begin_stride.batch),
        end_(block.key_end + n * block.end_stride.head + b * block.end_stride.batch),
        begin_row_(block.begin_stride.row),
        end_row_(block.end_stride.row),
        k_len_(block.k_len) {}

  Interval of(int64_t i) const {
    const int64_t begin = std::max<int64_t>(begin_[i * begin_row_], 0);
    const int64_t end = std::min<int64_t>(end_[i * end_row_], k_len_);
    if (begin >= end) return {std::numeric_limits<int64_t>::max(), 0};
    return {begin, end};
  }

 private:
  const int32_t *begin_, *end_;
  int64_t begin_row_, end_row_, k_len_;
};

}  // namespace ring_attention::cpu
