// SPDX-License-Identifier: BSD-3-Clause
#include "reads.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace ring_attention::plan {

namespace {

// Calls visit(part, segment) for the parts of a run that lie in each segment.
template <typename Visit>
void for_each_part(const Run& run, const Segments& mask, const Visit& visit) {
  for_each_block_among(run, mask, [&](const Run& rows) {
    for (auto s = mask.from(rows.start); s != mask.list().end() && s->begin < rows.end(); ++s) {
      for (const Run& part : clip(rows, s->begin, s->end)) visit(part, *s);
    }
  });
}

// The union of the intervals of the rows of one part. Bounds of different slope nest, so the ends
// suffice; a window of width w also has no gaps while neighbouring blocks are at most w apart.
void add_visible(const Run& part, const Segment& s, std::vector<Range>& out) {
  const bool nested = s.lo.slope != s.hi.slope || s.lo.slope == 0;
  const int64_t width = s.hi.base - s.lo.base;
  if (nested || part.count == 1 || part.stride - part.block + 1 <= width) {
    const Range range = {s.lo.at(part.start), s.hi.at(part.end() - 1)};
    if (!out.empty() && out.back().begin <= range.begin && range.begin <= out.back().end) {
      out.back().end = std::max(out.back().end, range.end);
    } else {
      out.push_back(range);
    }
    return;
  }
  for (int64_t i = 0; i < part.count; ++i) {
    const int64_t first = part.start + i * part.stride;
    out.push_back({s.lo.at(first), s.hi.at(first + part.block - 1)});
  }
}

// The rows of a segment that see one of a stretch of keys: bounds are lines, so it is one interval.
Range viewers_of(const Segment& s, const Run& keys) {
  Range rows = {s.begin, s.end};
  if (s.lo.slope == 1) {
    rows.end = std::min(rows.end, keys.end() - s.lo.base);
  } else if (s.lo.base >= keys.end()) {
    return {};
  }
  if (s.hi.slope == 1) {
    rows.begin = std::max(rows.begin, keys.start + 1 - s.hi.base);
  } else if (s.hi.base <= keys.start) {
    return {};
  }
  return rows;
}

// The rows of a part of a shard of queries that see one of `keys`, one by one.
void add_viewers(const Run& part, const Segment& s, const Shard& keys, std::vector<Range>& out) {
  const auto sees = [&](int64_t p) {
    return keys.count_below(s.lo.at(p)) < keys.count_below(s.hi.at(p));
  };
  const bool alike = s.lo.slope == 0 && s.hi.slope == 0;
  if (alike && !sees(part.start)) return;
  for (int64_t i = 0; i < part.count; ++i) {
    for (int64_t j = 0; j < part.block; ++j) {
      const int64_t p = part.start + i * part.stride + j;
      if (!alike && !sees(p)) continue;
      if (!out.empty() && out.back().end == p) {
        ++out.back().end;
      } else {
        out.push_back({p, p + 1});
      }
    }
  }
}

int64_t count_below(const Run& part, const Line& line, const Shard& keys) {
  if (line.slope == 0) return part.rows() * keys.count_below(line.base);
  int64_t pairs = 0;
  for (const Run& run : keys.runs()) pairs += pairs_below(part, run, line.base);
  return pairs;
}

}  // namespace

Reads::Reads(std::vector<Segments> samples, Layout q, Layout k)
    : samples_(std::move(samples)), q_(std::move(q)), k_(std::move(k)) {
  if (q_.world_size() != k_.world_size() || samples_.empty()) {
    throw std::invalid_argument("planner: layouts of one world and at least one sample");
  }
  for (const Segments& mask : samples_) {
    if (mask.q_len() != q_.length() || mask.k_len() != k_.length()) {
      throw std::invalid_argument("planner: mask and layouts differ in length");
    }
  }
}

Ranges Reads::visible(int64_t reader) const {
  std::vector<Range> positions;
  for (const Segments& mask : samples_) {
    for (const Run& run : q_.shard(reader).runs()) {
      for_each_part(run, mask,
                    [&](const Run& part, const Segment& s) { add_visible(part, s, positions); });
    }
  }
  return Ranges(std::move(positions));
}

Ranges Reads::viewers(int64_t owner, const Shard& keys) const {
  constexpr size_t kFew = 8;  // runs of keys; stripes are many, and looked at from the queries
  bool stretches = keys.runs().size() <= kFew;
  for (const Run& run : keys.runs()) stretches = stretches && run.count == 1;
  const Shard& queries = q_.shard(owner);
  std::vector<Range> positions;
  for (const Segments& mask : samples_) {
    if (stretches) {
      for (const Segment& s : mask.list()) {
        for (const Run& run : keys.runs()) {
          const Range rows = viewers_of(s, run);
          if (rows.begin < rows.end) positions.push_back(rows);
        }
      }
      continue;
    }
    for (const Run& run : queries.runs()) {
      for_each_part(run, mask, [&](const Run& part, const Segment& s) {
        add_viewers(part, s, keys, positions);
      });
    }
  }
  return queries.rows(Ranges(std::move(positions)));
}

int64_t Reads::pairs(int64_t reader, const Shard& keys) const {
  int64_t pairs = 0;
  for (const Segments& mask : samples_) {
    for (const Run& run : q_.shard(reader).runs()) {
      for_each_part(run, mask, [&](const Run& part, const Segment& s) {
        const int64_t below = keys.count_below(s.lo.at(part.start));
        if (below == keys.count_below(s.hi.at(part.end() - 1))) return;
        pairs += count_below(part, s.hi, keys) - count_below(part, s.lo, keys);
      });
    }
  }
  return pairs;
}

int64_t Reads::own_split(int64_t rank) const {
  const Shard& own = k_.shard(rank);
  const int64_t total = pairs(rank, own);
  int64_t low = 0, high = own.size();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (2 * pairs(rank, own.first(middle)) < total) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace ring_attention::plan
