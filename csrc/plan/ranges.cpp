// SPDX-License-Identifier: BSD-3-Clause
#include "ranges.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace ring_attention::plan {

Ranges::Ranges(std::vector<Range> any_order) {
  const auto by_begin = [](const Range& a, const Range& b) { return a.begin < b.begin; };
  if (!std::is_sorted(any_order.begin(), any_order.end(), by_begin)) {
    std::sort(any_order.begin(), any_order.end(), by_begin);
  }
  for (const Range& r : any_order) append(r.begin, r.end);
}

int64_t Ranges::size() const {
  int64_t size = 0;
  for (const Range& r : list_) size += r.end - r.begin;
  return size;
}

void Ranges::append(int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (!list_.empty() && begin <= list_.back().end) {
    list_.back().end = std::max(list_.back().end, end);
  } else {
    list_.push_back({begin, end});
  }
}

Ranges unite(const Ranges& a, const Ranges& b) {
  Ranges out;
  auto i = a.list().begin(), j = b.list().begin();
  while (i != a.list().end() || j != b.list().end()) {
    const bool take_a = j == b.list().end() || (i != a.list().end() && i->begin <= j->begin);
    const Range& r = take_a ? *i++ : *j++;
    out.append(r.begin, r.end);
  }
  return out;
}

Ranges relative_to(const Ranges& rows, const Ranges& held) {
  Ranges out;
  auto h = held.list().begin();
  int64_t before = 0;  // rows held in front of *h
  for (const Range& r : rows.list()) {
    while (h != held.list().end() && h->end < r.end) {
      before += h->end - h->begin;
      ++h;
    }
    if (h == held.list().end() || r.begin < h->begin) {
      throw std::logic_error("planner: rows that are not held are used");
    }
    out.append(before + r.begin - h->begin, before + r.end - h->begin);
  }
  return out;
}

}  // namespace ring_attention::plan
