// SPDX-License-Identifier: BSD-3-Clause
#include "key_intervals.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace ring_attention::plan {

namespace {

// The segments of one stretch of rows: [first, first + size) share their begin and end.
struct Stretch {
  const Segment* first;
  int size;
};

// Calls visit(stretch, part) for the parts of a run that lie in each stretch.
template <typename Visit>
void for_each_part(const Run& run, const Segments& mask, const Visit& visit) {
  for_each_block_among(run, mask, [&](const Run& rows) {
    for (auto s = mask.from(rows.start); s != mask.list().end() && s->begin < rows.end();) {
      auto next = s;
      while (next != mask.list().end() && next->begin == s->begin) ++next;
      const Stretch stretch = {&*s, static_cast<int>(next - s)};
      for (const Run& part : clip(rows, s->begin, s->end)) visit(stretch, part);
      s = next;
    }
  });
}

struct Row {
  Range intervals[kMaxIntervals];
  int size = 0;

  bool operator==(const Row& other) const {
    return size == other.size && std::equal(intervals, intervals + size, other.intervals);
  }
};

// The local key rows that query position p sees: empty intervals vanish, touching ones join.
Row local_row(const Stretch& stretch, int64_t p, const Shard& keys) {
  Row row;
  for (int n = 0; n < stretch.size; ++n) {
    const Segment& s = stretch.first[n];
    const Range seen = {keys.count_below(s.lo.at(p)), keys.count_below(s.hi.at(p))};
    if (seen.begin == seen.end) continue;
    if (row.size > 0 && row.intervals[row.size - 1].end == seen.begin) {
      row.intervals[row.size - 1].end = seen.end;
    } else {
      row.intervals[row.size++] = seen;
    }
  }
  return row;
}

// Whether all rows of a part see the same. Bounds never fall inside a segment, so its ends decide -
// but by their bounds: two rows that see nothing may lie on both sides of one that sees a key.
bool constant(const Stretch& stretch, const Run& part, const Shard& keys) {
  const int64_t first = part.start, last = part.end() - 1;
  const auto same = [&](const Line& line) {
    return keys.count_below(line.at(first)) == keys.count_below(line.at(last));
  };
  return std::all_of(stretch.first, stretch.first + stretch.size,
                     [&](const Segment& s) { return same(s.lo) && same(s.hi); });
}

// Finds the held rows that intervals lie in; ascending intervals are found in linear time in all.
class Finder {
 public:
  explicit Finder(const Ranges& held) : list_(held.list()) {
    int64_t before = 0;
    for (const Range& range : list_) {
      shifts_.push_back(before - range.begin);
      before += range.end - range.begin;
    }
  }

  // What turns rows of the shard into rows of the block as held, at seen. One cursor per interval
  // of a row: first tokens and a window move independently.
  int64_t shift(const Range& seen, size_t& cursor) const {
    if (cursor == list_.size() || seen.begin < list_[cursor].begin) {
      cursor = std::partition_point(list_.begin(), list_.end(),
                                    [&](const Range& h) { return h.end < seen.end; }) -
               list_.begin();
    }
    while (cursor < list_.size() && list_[cursor].end < seen.end) ++cursor;
    if (cursor == list_.size() || seen.begin < list_[cursor].begin) {
      throw std::logic_error("planner: a query sees a row that is not held");
    }
    return shifts_[cursor];
  }

 private:
  const std::vector<Range>& list_;
  std::vector<int64_t> shifts_;  // per range
};

}  // namespace

KeyIntervals::KeyIntervals(const Reads& reads, int64_t rank, int64_t origin, const Ranges& held)
    : reads_(reads), queries_(reads.q().shard(rank)), keys_(reads.k().shard(origin)), held_(held) {
  for (const Segments& mask : reads_.samples()) {
    int64_t rows = 0;
    Row same;
    bool any = false;
    for (const Run& run : queries_.runs()) {
      for_each_part(run, mask, [&](const Stretch& stretch, const Run& part) {
        if (stretch.size > kMaxIntervals) {
          throw std::invalid_argument("planner: too many key intervals per row");
        }
        most_ = std::max(most_, stretch.size);
        if (!uniform_) return;
        rows += part.rows();
        const Row first = local_row(stretch, part.start, keys_);
        if (!any) same = first;
        any = true;
        uniform_ = first == same && constant(stretch, part, keys_);
      });
    }
    if (any && rows < queries_.size() && same.size > 0) uniform_ = false;
  }
}

int64_t KeyIntervals::rows() const { return uniform_ ? 1 : queries_.size(); }

int KeyIntervals::fill(int32_t* begin, int32_t* end) const {
  const int64_t samples = static_cast<int64_t>(reads_.samples().size());
  std::fill(begin, begin + most_ * samples * rows(), 0);
  std::fill(end, end + most_ * samples * rows(), 0);
  const Finder finder(held_);
  int used = 1;
  for (int64_t b = 0; b < samples; ++b) {
    size_t cursors[kMaxIntervals] = {};
    const auto write = [&](const Row& row, int64_t index) {
      for (int n = 0; n < row.size; ++n) {
        const Range& seen = row.intervals[n];
        const int64_t shift = finder.shift(seen, cursors[n]);
        const int64_t at = (n * samples + b) * rows() + index;
        begin[at] = static_cast<int32_t>(seen.begin + shift);
        end[at] = static_cast<int32_t>(seen.end + shift);
      }
      used = std::max(used, row.size);
    };
    for (size_t r = 0; r < queries_.runs().size(); ++r) {
      const Run& run = queries_.runs()[r];
      for_each_part(run, reads_.samples()[b], [&](const Stretch& stretch, const Run& part) {
        if (uniform_) return write(local_row(stretch, part.start, keys_), 0);
        int64_t index = queries_.offset(r) + run.count_below(part.start);
        for (int64_t i = 0; i < part.count; ++i) {
          for (int64_t j = 0; j < part.block; ++j) {
            write(local_row(stretch, part.start + i * part.stride + j, keys_), index++);
          }
        }
      });
    }
  }
  return used;
}

}  // namespace ring_attention::plan
