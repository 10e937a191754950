// SPDX-License-Identifier: BSD-3-Clause
#include "key_intervals.h"

#include <algorithm>
#include <stdexcept>

namespace ring_attention::plan {

namespace {

// The segments of one stretch of rows: [first, first + size) share their begin and end.
struct Stretch {
  const Segment* first;
  int size;
};

template <typename Visit>
void for_each_stretch(const Run& run, const Segments& mask, const Visit& visit) {
  for (auto s = mask.from(run.start); s != mask.list().end() && s->begin < run.end();) {
    auto next = s;
    while (next != mask.list().end() && next->begin == s->begin) ++next;
    visit(Stretch{&*s, static_cast<int>(next - s)});
    s = next;
  }
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

}  // namespace

KeyIntervals::KeyIntervals(const Reads& reads, int64_t rank, int64_t origin, const Ranges& held)
    : reads_(reads), queries_(reads.q().shard(rank)), keys_(reads.k().shard(origin)), held_(held) {
  int64_t before = 0;
  for (const Range& range : held_.list()) {
    before_.push_back(before);
    before += range.end - range.begin;
  }
  // Bounds never fall inside a segment: if its first and last row agree, all its rows do.
  for (const Segments& mask : reads_.samples()) {
    int64_t rows = 0;
    Row same;
    bool any = false;
    for (const Run& run : queries_.runs()) {
      for_each_stretch(run, mask, [&](const Stretch& stretch) {
        if (stretch.size > kMaxIntervals) {
          throw std::invalid_argument("planner: too many key intervals per row");
        }
        most_ = std::max(most_, stretch.size);
        for (const Run& part : clip(run, stretch.first->begin, stretch.first->end)) {
          rows += part.rows();
          const Row first = local_row(stretch, part.start, keys_);
          if (!any) same = first;
          any = true;
          uniform_ =
              uniform_ && first == same && first == local_row(stretch, part.end() - 1, keys_);
        }
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
  int used = 1;
  for (int64_t b = 0; b < samples; ++b) {
    for (size_t r = 0; r < queries_.runs().size(); ++r) {
      const Run& run = queries_.runs()[r];
      size_t range = 0;  // of held_, where the last interval was
      for_each_stretch(run, reads_.samples()[b], [&](const Stretch& stretch) {
        for (const Run& part : clip(run, stretch.first->begin, stretch.first->end)) {
          int64_t index = uniform_ ? 0 : queries_.offset(r) + run.count_below(part.start);
          for (int64_t i = 0; i < part.rows(); ++i, ++index) {
            const int64_t p = part.start + i / part.block * part.stride + i % part.block;
            const Row row = local_row(stretch, p, keys_);
            for (int n = 0; n < row.size; ++n) {
              const Range& seen = row.intervals[n];
              const auto& list = held_.list();
              if (range >= list.size() || seen.begin < list[range].begin ||
                  seen.end > list[range].end) {
                range = std::partition_point(list.begin(), list.end(),
                                             [&](const Range& h) { return h.end < seen.end; }) -
                        list.begin();
              }
              if (range >= list.size() || seen.begin < list[range].begin) {
                throw std::invalid_argument("planner: a query sees a row that is not held");
              }
              const int64_t shift = before_[range] - list[range].begin;
              const int64_t at = (n * samples + b) * rows() + index;
              begin[at] = static_cast<int32_t>(seen.begin + shift);
              end[at] = static_cast<int32_t>(seen.end + shift);
            }
            used = std::max(used, row.size);
            if (uniform_) return;
          }
        }
      });
    }
  }
  return used;
}

}  // namespace ring_attention::plan
