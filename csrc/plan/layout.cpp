// SPDX-License-Identifier: BSD-3-Clause
#include "layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace ring_attention::plan {

namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// sum_{0 <= y < z} min(y, b)
int64_t ramp(int64_t z, int64_t b) {
  if (z <= 0) return 0;
  return z <= b ? z * (z - 1) / 2 : b * (b - 1) / 2 + (z - b) * b;
}

// Runs of equal stride s. With d = base + q.start - k.start, block i of q, block i + delta of k and
// offsets j, j' in them, j' < j + d - delta s. Only the few delta with |delta s - d| < block need a
// look inside the blocks; below them every pair counts, above them none.
int64_t pairs_of_equal_stride(const Run& q, const Run& k, int64_t base) {
  const int64_t s = q.stride, d = base + q.start - k.start;
  int64_t delta = floor_div(d - k.block, s);  // the last with all pairs
  int64_t pairs =
      q.block * k.block * (ramp(q.count + delta + 1, k.count) - ramp(delta + 1, k.count));
  for (++delta; delta * s - d < q.block - 1; ++delta) {
    const int64_t blocks = std::min(q.count, k.count - delta) - std::max<int64_t>(0, -delta);
    const int64_t e = delta * s - d;
    if (blocks > 0) pairs += blocks * (ramp(q.block - e, k.block) - ramp(-e, k.block));
  }
  return pairs;
}

}  // namespace

int64_t Run::count_below(int64_t x) const {
  const int64_t z = x - start;
  if (z <= 0) return 0;
  if (count == 1) return std::min(z, block);
  const int64_t i = z / stride;
  return i >= count ? rows() : i * block + std::min(z - i * stride, block);
}

int64_t Run::sum_below(int64_t x) const {
  const int64_t z = x - start;
  if (z <= 0) return 0;
  if (count == 1) return ramp(z, block);
  const int64_t i = std::min(z / stride, count), rest = z - i * stride;
  const int64_t whole = block * stride * (i * (i - 1) / 2) + i * ramp(stride, block);
  return whole + rest * i * block + (i < count ? ramp(rest, block) : 0);
}

int64_t Clip::rows() const {
  int64_t rows = 0;
  for (const Run& part : *this) rows += part.rows();
  return rows;
}

Clip clip(const Run& run, int64_t begin, int64_t end) {
  Clip out;
  const auto add = [&](int64_t from, int64_t to) {  // inside one block
    if (from < to) out.parts[out.size++] = {from, to - from, to - from, 1};
  };
  begin = std::max(begin, run.start);
  end = std::min(end, run.end());
  if (begin >= end) return out;
  if (run.count == 1) {
    add(begin, end);
    return out;
  }
  const int64_t first = (begin - run.start) / run.stride, last = (end - 1 - run.start) / run.stride;
  const int64_t first_start = run.start + first * run.stride;
  const int64_t last_start = run.start + last * run.stride;
  if (first == last) {
    add(begin, std::min(end, first_start + run.block));
    return out;
  }
  const bool cut_first = begin > first_start, cut_last = end < last_start + run.block;
  if (cut_first) add(begin, first_start + run.block);
  const int64_t whole = last - first + 1 - cut_first - cut_last;
  if (whole > 0) {
    out.parts[out.size++] = {first_start + cut_first * run.stride, run.block, run.stride, whole};
  }
  if (cut_last) add(last_start, end);
  return out;
}

int64_t pairs_below(const Run& q, const Run& k, int64_t base) {
  if (base + q.end() - 1 <= k.start) return 0;
  if (base + q.start >= k.end()) return q.rows() * k.rows();
  if (q.count == 1) {
    return k.sum_below(base + q.start + q.block) - k.sum_below(base + q.start);
  }
  if (k.count == 1) {  // from the keys' side: every query but those at or before j - base
    const int64_t from = k.start - base + 1;
    return k.block * q.rows() - (q.sum_below(from + k.block) - q.sum_below(from));
  }
  if (q.stride == k.stride) return pairs_of_equal_stride(q, k, base);
  int64_t pairs = 0;  // strides that do not match: block by block
  const Run& loop = q.count <= k.count ? q : k;
  for (int64_t i = 0; i < loop.count; ++i) {
    const Run block = {loop.start + i * loop.stride, loop.block, loop.block, 1};
    pairs += q.count <= k.count ? pairs_below(block, k, base) : pairs_below(q, block, base);
  }
  return pairs;
}

Shard::Shard(std::vector<Run> runs) {
  int64_t end = 0;
  for (Run run : runs) {
    if (run.block <= 0 || run.count <= 0) continue;
    if (run.count > 1 && run.stride == run.block) run = {run.start, run.rows(), run.rows(), 1};
    if (run.start < end || (run.count > 1 && run.stride < run.block)) {
      throw std::invalid_argument("planner: the runs of a shard ascend and do not overlap, got " +
                                  std::to_string(run.start) + " after " + std::to_string(end));
    }
    end = run.end();
    if (!runs_.empty() && runs_.back().count == 1 && run.count == 1 &&
        runs_.back().end() == run.start) {
      runs_.back().block += run.block;
      runs_.back().stride = runs_.back().block;
    } else {
      runs_.push_back(run);
      offsets_.push_back(size_);
    }
    size_ += run.rows();
  }
}

int64_t Shard::count_below(int64_t x) const {
  // The last run that starts before x.
  const auto next = std::partition_point(runs_.begin(), runs_.end(),
                                         [x](const Run& run) { return run.start < x; });
  if (next == runs_.begin()) return 0;
  const size_t run = static_cast<size_t>(next - runs_.begin()) - 1;
  return offsets_[run] + runs_[run].count_below(x);
}

Shard Shard::first(int64_t rows) const {
  std::vector<Run> cut;
  for (const Run& run : runs_) {
    const int64_t whole = std::min(rows / run.block, run.count);
    if (whole > 0) cut.push_back({run.start, run.block, run.stride, whole});
    rows -= whole * run.block;
    if (whole < run.count) {
      cut.push_back({run.start + whole * run.stride, rows, rows, 1});
      break;
    }
  }
  return Shard(std::move(cut));
}

Ranges Shard::rows(const Ranges& positions) const {
  Ranges rows;
  if (size_ == 0) return rows;
  const auto& list = positions.list();
  const int64_t first = runs_.front().start, last = runs_.back().end();
  auto range = std::partition_point(list.begin(), list.end(),
                                    [first](const Range& r) { return r.end <= first; });
  for (; range != list.end() && range->begin < last; ++range) {
    rows.append(count_below(range->begin), count_below(range->end));
  }
  return rows;
}

Layout::Layout(int64_t length, std::vector<Shard> shards)
    : length_(length), shards_(std::move(shards)) {
  int64_t rows = 0;
  for (const Shard& shard : shards_) {
    rows += shard.size();
    if (shard.size() > 0 && shard.runs().back().end() > length) {
      throw std::invalid_argument("planner: a shard reaches past the length of its layout");
    }
  }
  if (rows != length) {
    throw std::invalid_argument("planner: the shards of a layout hold " + std::to_string(rows) +
                                " rows, its length is " + std::to_string(length));
  }
}

}  // namespace ring_attention::plan
