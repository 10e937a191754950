// SPDX-License-Identifier: BSD-3-Clause
//
// Sets of integers as sorted, disjoint, non-touching half-open ranges.
#pragma once

#include <cstdint>
#include <vector>

namespace ring_attention::plan {

struct Range {
  int64_t begin = 0, end = 0;
  bool operator==(const Range&) const = default;
};

class Ranges {
 public:
  Ranges() = default;
  explicit Ranges(std::vector<Range> any_order);  // sorts, merges, drops empty ranges

  const std::vector<Range>& list() const { return list_; }
  bool empty() const { return list_.empty(); }
  int64_t size() const;  // how many integers, not how many ranges
  bool operator==(const Ranges&) const = default;

  // Adds [begin, end), which starts at or after the start of every range so far.
  void append(int64_t begin, int64_t end);

 private:
  std::vector<Range> list_;
};

Ranges unite(const Ranges& a, const Ranges& b);

// `rows`, a subset of `held`, as indices into the concatenation of held's ranges.
// Throws std::logic_error if it is no subset.
Ranges relative_to(const Ranges& rows, const Ranges& held);

}  // namespace ring_attention::plan
