// SPDX-License-Identifier: BSD-3-Clause
#include "segments.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace ring_attention::plan {

namespace {

struct Interval {
  Line lo, hi;
};

using Intervals = std::vector<Interval>;

// Two lines of different slope meet at one row. Cutting there and right after it leaves stretches
// on which "below, equal or above" holds for all rows or for none, so that one row decides.
void add_cuts(const std::vector<Line>& lines, int64_t begin, int64_t end,
              std::vector<int64_t>& cuts) {
  for (const Line& rising : lines) {
    if (rising.slope == 0) continue;
    for (const Line& level : lines) {
      if (level.slope != 0) continue;
      const int64_t meet = level.base - rising.base;
      for (const int64_t cut : {meet, meet + 1}) {
        if (begin < cut && cut < end) cuts.push_back(cut);
      }
    }
  }
}

// The line that both stretches follow, if there is one. A stretch of one row fits either slope.
bool join(const Line& left, int64_t left_rows, const Line& right, int64_t right_rows, int64_t seam,
          Line& joined) {
  const int64_t rise = right.at(seam) - left.at(seam - 1);
  if (left == right || (right_rows == 1 && left.at(seam) == right.at(seam))) {
    joined = left;
  } else if (left_rows == 1 && right.at(seam - 1) == left.at(seam - 1)) {
    joined = right;
  } else if (left_rows == 1 && right_rows == 1 && (rise == 0 || rise == 1)) {
    joined = {left.at(seam - 1) - rise * (seam - 1), rise};
  } else {
    return false;
  }
  return true;
}

}  // namespace

// Walks two tables in step; `op` combines their intervals wherever both are lines in fixed order.
class Sweep {
 public:
  Sweep(const Segments& a, const Segments& b) : a_(a.list_), b_(b.list_), out_(a.q_len_, a.k_len_) {
    if (a.q_len_ != b.q_len_ || a.k_len_ != b.k_len_) {
      throw std::invalid_argument("planner: masks of different lengths cannot be combined");
    }
  }

  template <typename Op>
  Segments run(const Op& op) {
    size_t i = 0, j = 0;
    for (int64_t p = 0; p < out_.q_len_;) {
      while (i < a_.size() && a_[i].end <= p) ++i;
      while (j < b_.size() && b_[j].end <= p) ++j;
      int64_t end = out_.q_len_;
      load(a_, i, p, end, left_);
      load(b_, j, p, end, right_);
      if (!left_.empty() || !right_.empty()) stretch(p, end, op);
      p = end;
    }
    return std::move(out_);
  }

 private:
  // The intervals of row p in `table`, whose entry `at` is the first to end after p; lowers `end`
  // to where that changes.
  static void load(const std::vector<Segment>& table, size_t at, int64_t p, int64_t& end,
                   Intervals& intervals) {
    intervals.clear();
    if (at == table.size()) return;
    if (table[at].begin > p) {
      end = std::min(end, table[at].begin);
      return;
    }
    end = std::min(end, table[at].end);
    for (; at < table.size() && table[at].begin <= p; ++at) {
      intervals.push_back({table[at].lo, table[at].hi});
    }
  }

  template <typename Op>
  void stretch(int64_t begin, int64_t end, const Op& op) {
    lines_.clear();
    for (const Intervals* side : {&left_, &right_}) {
      for (const Interval& interval : *side) {
        lines_.push_back(interval.lo);
        lines_.push_back(interval.hi);
      }
    }
    cuts_.assign({begin});
    add_cuts(lines_, begin, end, cuts_);
    cuts_.push_back(end);
    std::sort(cuts_.begin(), cuts_.end());
    for (size_t c = 0; c + 1 < cuts_.size(); ++c) {
      if (cuts_[c] == cuts_[c + 1]) continue;
      result_.clear();
      op(left_, right_, cuts_[c], result_);
      emit(cuts_[c], cuts_[c + 1]);
    }
  }

  // Appends result_ over [begin, end), as a continuation of the last stretch where it is one.
  void emit(int64_t begin, int64_t end) {
    std::vector<Segment>& list = out_.list_;
    const size_t count = result_.size();
    if (count == 0) return;
    if (last_count_ == count && list.back().end == begin && continues(begin, end)) {
      for (size_t n = 0; n < count; ++n) {
        Segment& segment = list[list.size() - count + n];
        segment = {segment.begin, end, result_[n].lo, result_[n].hi};
      }
      return;
    }
    for (const Interval& interval : result_) list.push_back({begin, end, interval.lo, interval.hi});
    last_count_ = count;
  }

  bool continues(int64_t begin, int64_t end) {
    joined_ = result_;
    for (size_t n = 0; n < result_.size(); ++n) {
      const Segment& last = out_.list_[out_.list_.size() - result_.size() + n];
      const int64_t rows = last.end - last.begin;
      if (!join(last.lo, rows, result_[n].lo, end - begin, begin, joined_[n].lo) ||
          !join(last.hi, rows, result_[n].hi, end - begin, begin, joined_[n].hi)) {
        return false;
      }
    }
    result_.swap(joined_);
    return true;
  }

  const std::vector<Segment>&a_, &b_;
  Segments out_;
  size_t last_count_ = 0;
  Intervals left_, right_, result_, joined_;
  std::vector<Line> lines_;
  std::vector<int64_t> cuts_;
};

Segments intersect(const Segments& a, const Segments& b) {
  return Sweep(a, b).run(
      [](const Intervals& left, const Intervals& right, int64_t p, Intervals& out) {
        for (const Interval& x : left) {
          for (const Interval& y : right) {
            const Interval both = {x.lo.at(p) >= y.lo.at(p) ? x.lo : y.lo,
                                   x.hi.at(p) <= y.hi.at(p) ? x.hi : y.hi};
            if (both.lo.at(p) < both.hi.at(p)) out.push_back(both);
          }
        }
      });
}

Segments unite(const Segments& a, const Segments& b) {
  return Sweep(a, b).run(
      [](const Intervals& left, const Intervals& right, int64_t p, Intervals& out) {
        Intervals all = left;
        all.insert(all.end(), right.begin(), right.end());
        std::sort(all.begin(), all.end(),
                  [p](const Interval& x, const Interval& y) { return x.lo.at(p) < y.lo.at(p); });
        for (const Interval& x : all) {
          if (!out.empty() && x.lo.at(p) <= out.back().hi.at(p)) {
            if (x.hi.at(p) > out.back().hi.at(p)) out.back().hi = x.hi;
          } else {
            out.push_back(x);
          }
        }
      });
}

Segments::Segments(int64_t q_len, int64_t k_len, const std::vector<Segment>& stretches)
    : Segments(q_len, k_len) {
  if (q_len < 0 || k_len < 0) throw std::invalid_argument("planner: lengths are at least 0");
  Segments raw(q_len, k_len), all(q_len, k_len);
  for (Segment s : stretches) {
    if ((s.lo.slope & ~int64_t{1}) != 0 || (s.hi.slope & ~int64_t{1}) != 0) {
      throw std::invalid_argument("planner: the slope of a segment is 0 or 1");
    }
    if (s.begin < (raw.list_.empty() ? s.begin : raw.list_.back().end)) {
      throw std::invalid_argument("planner: segments are sorted and disjoint, not from row " +
                                  std::to_string(s.begin));
    }
    s.begin = std::max<int64_t>(s.begin, 0);
    s.end = std::min(s.end, q_len);
    if (s.begin < s.end) raw.list_.push_back(s);
  }
  if (q_len > 0) all.list_.push_back({0, q_len, {0, 0}, {k_len, 0}});
  list_ = std::move(intersect(raw, all).list_);
}

int Segments::intervals(int64_t* row) const {
  int most = 0;
  for (size_t i = 0; i < list_.size();) {
    size_t j = i;
    while (j < list_.size() && list_[j].begin == list_[i].begin) ++j;
    if (static_cast<int>(j - i) > most) {
      most = static_cast<int>(j - i);
      if (row != nullptr) *row = list_[i].begin;
    }
    i = j;
  }
  return most;
}

std::vector<Segment>::const_iterator Segments::from(int64_t position) const {
  return std::partition_point(list_.begin(), list_.end(),
                              [position](const Segment& s) { return s.end <= position; });
}

}  // namespace ring_attention::plan
