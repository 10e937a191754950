// SPDX-License-Identifier: BSD-3-Clause
//
// The mask as the kernels want it: per own query row, intervals of key indices of one block.
#pragma once

#include <cstdint>

#include "ranges.h"
#include "reads.h"

namespace ring_attention::plan {

class KeyIntervals {
 public:
  // Of `rank`'s queries over the block of `origin`, of which the rows `held` are held.
  KeyIntervals(const Reads& reads, int64_t rank, int64_t origin, const Ranges& held);

  // Intervals per row (at least 1), as far as known without looking at every row.
  int most() const { return most_; }
  // Whether every row of a sample sees the same: then one row stands for all of them.
  bool uniform() const { return uniform_; }
  // Rows that fill() writes per sample.
  int64_t rows() const;
  // Writes [most, samples, rows] begins and ends; returns how many intervals are really used.
  int fill(int32_t* begin, int32_t* end) const;

 private:
  const Reads& reads_;
  const Shard &queries_, &keys_;
  const Ranges& held_;
  int most_ = 1;
  bool uniform_ = true;
};

}  // namespace ring_attention::plan
