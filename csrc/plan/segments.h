// SPDX-License-Identifier: BSD-3-Clause
//
// A mask of one sample as a table of segments.
//
// Note [segments]. A mask says which key positions each query position sees. Every mask we know is
// one interval of keys per row, or a union of few, whose bounds are piecewise linear in the query
// position with slope 0 (documents, prefixes) or 1 (causal, windows). A segment is a stretch of
// query positions over which the bounds are lines; a table for 10,000 packed documents has 10,000
// segments, however many tokens they hold. Normal form, which every Segments object is in:
//   * sorted by (begin, lo); segments that share a row share the whole stretch [begin, end);
//   * 0 <= lo < hi <= k_len on every row of a segment; rows in no segment see nothing;
//   * the intervals of a row are disjoint and do not touch.
#pragma once

#include <cstdint>
#include <vector>

namespace ring_attention::plan {

// The intervals one query row may have. Kernels take any number; two covers "first tokens +
// window".
inline constexpr int kMaxIntervals = 2;

struct Line {
  int64_t base = 0, slope = 0;  // slope is 0 or 1
  int64_t at(int64_t position) const { return base + slope * position; }
  bool operator==(const Line&) const = default;
};

// Query positions [begin, end) see the key positions [lo.at(p), hi.at(p)).
struct Segment {
  int64_t begin = 0, end = 0;
  Line lo, hi;
  bool operator==(const Segment&) const = default;
};

class Segments {
 public:
  // Clamps `stretches`, which are sorted and disjoint in query positions, to [0, k_len).
  Segments(int64_t q_len, int64_t k_len, const std::vector<Segment>& stretches);

  int64_t q_len() const { return q_len_; }
  int64_t k_len() const { return k_len_; }
  const std::vector<Segment>& list() const { return list_; }
  bool operator==(const Segments&) const = default;

  // The most intervals of any row, and (if asked) the first row that has that many.
  int intervals(int64_t* row = nullptr) const;
  // The first segment that ends after `position`.
  std::vector<Segment>::const_iterator from(int64_t position) const;

  friend Segments intersect(const Segments& a, const Segments& b);
  friend Segments unite(const Segments& a, const Segments& b);

 private:
  friend class Sweep;
  Segments(int64_t q_len, int64_t k_len) : q_len_(q_len), k_len_(k_len) {}

  int64_t q_len_, k_len_;
  std::vector<Segment> list_;
};

Segments intersect(const Segments& a, const Segments& b);
Segments unite(const Segments& a, const Segments& b);

}  // namespace ring_attention::plan
