// SPDX-License-Identifier: BSD-3-Clause
//
// Which rank owns which positions, and counting on it in closed form.
//
// Note [counting]. Local order is ascending, so the rows of a shard that lie in the positions
// [x, y) are its local rows [count_below(x), count_below(y)). Everything the planner computes -
// rows to send, key intervals, query-key pairs - is made of count_below and its sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ranges.h"

namespace ring_attention::plan {

// `count` blocks of `block` positions, `stride` apart: a chunk of a zigzag is one block, a striped
// shard one long run.
struct Run {
  int64_t start = 0, block = 0, stride = 0, count = 0;

  int64_t rows() const { return block * count; }
  int64_t end() const { return start + (count - 1) * stride + block; }  // after the last position
  int64_t count_below(int64_t x) const;                                 // positions < x
  int64_t sum_below(int64_t x) const;  // sum_{y < x} count_below(y)
};

// The part of a run inside [begin, end): a cut first block, whole blocks, a cut last block.
struct Clip {
  Run parts[3];
  int size = 0;
  const Run* begin() const { return parts; }
  const Run* end() const { return parts + size; }
  int64_t rows() const;
};
Clip clip(const Run& run, int64_t begin, int64_t end);

// Pairs (p in q, j in k) with j < base + p.
int64_t pairs_below(const Run& q, const Run& k, int64_t base);

// The positions of one rank, ascending: runs that do not interleave.
class Shard {
 public:
  explicit Shard(std::vector<Run> runs);

  int64_t size() const { return size_; }
  const std::vector<Run>& runs() const { return runs_; }
  int64_t offset(size_t run) const { return offsets_[run]; }  // rows in front of a run
  int64_t count_below(int64_t x) const;
  Shard first(int64_t rows) const;             // the shard cut after so many rows
  Ranges rows(const Ranges& positions) const;  // local rows inside a set of positions

 private:
  std::vector<Run> runs_;
  std::vector<int64_t> offsets_;
  int64_t size_ = 0;
};

class Layout {
 public:
  Layout(int64_t length, std::vector<Shard> shards);

  int64_t length() const { return length_; }
  int64_t world_size() const { return static_cast<int64_t>(shards_.size()); }
  const Shard& shard(int64_t rank) const { return shards_.at(static_cast<size_t>(rank)); }

 private:
  int64_t length_;
  std::vector<Shard> shards_;
};

}  // namespace ring_attention::plan
