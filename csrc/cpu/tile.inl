// SPDX-License-Identifier: BSD-3-Clause
//
// A tile of query rows: which rows of the tensors it is, and what they see. Its panels are as many
// rows as multiply() takes lanes; panels are skipped, folded and masked on their own.
#pragma once

#include "operands.inl"

namespace ring_attention::cpu {
namespace {

template <typename Arch>
struct QueryTile {
  using Elem = typename Arch::Elem;
  using State = typename Arch::State;
  using V = typename Arch::V;

  int64_t panel, rows;  // rows is a multiple of panel
  int64_t first_head, batch;
  QueryRows query_rows;
  int64_t* head;         // [rows] -1 for padding
  int64_t* query;        // [rows] padding repeats the last one
  int64_t* panel_lanes;  // [rows / panel]
  int64_t* begin;        // [rows] intervals of the block in hand
  int64_t* end;          // [rows]
  Extent* extents;       // [rows / panel]
  Span span;             // of the whole tile
  const Elem** source;   // [rows]
  State* low;            // [panel] intervals relative to the key block in hand
  State* high;           // [panel]

  QueryTile(const AttentionParams& p, int64_t panel_rows, int64_t b, int64_t kv_head)
      : panel(panel_rows),
        first_head(kv_head * (p.heads / p.kv_heads)),
        batch(b),
        query_rows(p, panel_rows) {}

  void take(Scratch& scratch, int64_t max_rows) {
    scratch.array(head, max_rows);
    scratch.array(query, max_rows);
    scratch.array(panel_lanes, max_rows / panel);
    scratch.array(begin, max_rows);
    scratch.array(end, max_rows);
    scratch.array(extents, max_rows / panel);
    scratch.array(source, max_rows);
    scratch.array(low, panel);
    scratch.array(high, panel);
  }

  // To the rows [first, first + count).
  void move_to(int64_t first, int64_t count) {
    rows = round_up(count, panel);
    // Counted: a division per row may take 90 cycles.
    int64_t group_head = query_rows.head(first), index = query_rows.index(first);
    for (int64_t i = 0; i < rows; ++i) {
      const bool is_real = group_head < query_rows.group && index < query_rows.q_len;
      query[i] = is_real ? index : query_rows.q_len - 1;
      head[i] = is_real ? first_head + group_head : -1;
      if (++index == query_rows.head_rows) index = 0, ++group_head;
    }
    for (int64_t u = 0; u < panels(); ++u) {
      int64_t used = panel;
      while (used > 1 && !real(u * panel + used - 1)) --used;
      panel_lanes[u] = round_up(used, Arch::kWidthStep);
    }
  }
  int64_t panels() const { return rows / panel; }
  bool real(int64_t row) const { return head[row] >= 0; }
  // Lanes of a panel that a product has to take: all up to its last real row.
  int64_t lanes(int64_t u) const { return panel_lanes[u]; }

  // Whether the rows [first, first + count) are real and of one head.
  bool evenly_spaced(int64_t first, int64_t count) const {
    return real(first + count - 1) && head[first] == head[first + count - 1];
  }

  // Offset of a row of a [batch, heads, q_len, ...] tensor; the row is real.
  int64_t offset(int64_t row, const Strides& stride) const {
    return batch * stride.batch + head[row] * stride.head + query[row] * stride.row;
  }
  // The same for one number per query, contiguous [batch, heads, q_len].
  int64_t flat(int64_t row, const AttentionParams& p) const {
    return offset(row, {p.heads * p.q_len, p.q_len, 1});
  }

  // Points source at the rows of a tensor; padding reads as zeros.
  const Elem* const* rows_of(const void* data, const Strides& stride) {
    for (int64_t i = 0; i < rows; ++i) {
      source[i] = real(i) ? static_cast<const Elem*>(data) + offset(i, stride) : nullptr;
    }
    return source;
  }

  // Intervals n of a block, for every row. Padding sees what the last query sees, so that it asks
  // for no mask of its own.
  void see(const KVBlock& block, int64_t n) {
    const Intervals intervals(block, n, batch);
    span = {};
    for (int64_t u = 0; u < panels(); ++u) {
      Extent seen_of_panel;
      for (int64_t i = u * panel; i < (u + 1) * panel; ++i) {
        const Interval seen = intervals.of(query[i]);
        begin[i] = seen.begin;
        end[i] = seen.end;
        seen_of_panel.add(seen.begin, seen.end);
      }
      extents[u] = seen_of_panel;
      span.begin = std::min(span.begin, seen_of_panel.begin);
      span.end = std::max(span.end, seen_of_panel.end);
    }
  }

  // How many panels see any of the keys [from, from + count).
  int64_t touching(int64_t from, int64_t count) const {
    return std::count_if(extents, extents + panels(),
                         [&](const Extent& seen) { return seen.touches(from, from + count); });
  }

  // Fills unseen[j] for the keys [from, from + count): true where no row sees the key. Returns
  // null where what each panel sees has no holes.
  const bool* mark_unseen(int64_t from, int64_t count, bool* unseen) const {
    bool whole = true;
    for (int64_t u = 0; u < panels(); ++u) whole &= extents[u].whole;
    if (whole) return nullptr;
    int32_t change[Arch::kMaxKeyBlock + 1] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = std::max(begin[i] - from, int64_t{0}), e = std::min(end[i] - from, count);
      if (b < e) ++change[b], --change[e];
    }
    for (int64_t j = 0, seen = 0; j < count; ++j) unseen[j] = (seen += change[j]) == 0;
    return unseen;
  }

  // The intervals of a panel relative to key `from`, as lanes.
  void bound(int64_t u, int64_t from, int64_t count) {
    for (int64_t i = 0; i < panel; ++i) {
      low[i] = static_cast<State>(std::clamp(begin[u * panel + i] - from, int64_t{0}, count));
      high[i] = static_cast<State>(std::clamp(end[u * panel + i] - from, int64_t{0}, count));
    }
  }
};

// To be written soon.
template <typename T>
RA_INLINE void fetch_row(T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += kCacheLine / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + i, 1);
  }
}

// Calls visit(row, numbers, to) for every real row of panel u, given as X^T [dim][panel], turning
// kLanes rows at a time in `scratch` [kLanes][dim]. to = target(row) is where they are written,
// fetched ahead: a store to a line that is not in the cache holds up those behind it.
template <typename Arch, typename Target, typename Visit>
void for_transposed(const QueryTile<Arch>& tile, int64_t u, const typename Arch::State* lanes,
                    int64_t dim, typename Arch::State* scratch, const Target& target,
                    const Visit& visit) {
  using V = typename Arch::V;
  const int64_t first = u * tile.panel;
  for (int64_t i = 0; i < tile.panel; i += V::kLanes) {
    if (!tile.real(first + i)) continue;
    for (int64_t d = 0; d < dim; d += V::kLanes) {
      transpose_block(lanes + d * tile.panel + i, tile.panel, scratch + d, dim, V{});
    }
    for (int64_t row = first + i; row < first + i + V::kLanes; ++row) {
      if (!tile.real(row)) continue;
      const int64_t next = row + V::kLanes;
      if (next < tile.rows && tile.real(next)) fetch_row(target(next), dim);
      visit(row, scratch + (row - first - i) * dim, target(row));
    }
  }
}

// x where the lane sees the key, else other. A select: what an unseen key gives may be NaN.
template <typename V>
RA_INLINE V keep_visible(int64_t key, V low, V high, V x, V other) {
  return select(within(V::set(static_cast<typename V::Scalar>(key)), low, high), x, other);
}

// From products q k to scores in log2 units: scale q k log2(e), or c tanh(scale q k / c) log2(e).
// The factor of q k is Q^T's when it is loaded (one multiplication per element of Q, not one per
// score; scaled queries have to be finite), or else each product's. Products and tanh are rounded
// before a reference is subtracted, so that the largest score's P does not depend on how large it
// is; the forward and the backward round alike, or their P would differ.
template <typename Arch>
struct ScoreUnits {
  using State = typename Arch::State;
  using V = typename Arch::V;

  State factor, height;

  explicit ScoreUnits(const AttentionParams& p) {
    constexpr State log2e = static_cast<State>(kLog2e);
    const State scale = static_cast<State>(p.scale), cap = static_cast<State>(p.softcap);
    factor = cap != 0 ? scale / cap : scale * log2e;
    height = cap * log2e;
  }

  // Panels of Q^T, before any product with them.
  void scale_queries(typename Arch::Unit* q, int64_t count) const {
    if constexpr (Arch::kScalesQueries) {
      for (int64_t i = 0; i < count; i += V::kLanes) {
        (V::load(q + i) * V::set(factor)).store(q + i);
      }
    }
  }
  // A score, or with kCapped its tanh, which the caller multiplies by height.
  template <bool kCapped>
  RA_INLINE V of(V product) const {
    V score = Arch::kScalesQueries ? product : product * V::set(factor);
    if constexpr (kCapped) {
      pin(score);  // or g++ 12 keeps sums of AVX-512's product on the stack, see test_codegen.py
      score = tanh(score);
    }
    return score;
  }
};

// The rows of a key block that a panel touches. They lie on the grid of the register tiles, so that
// a row's reference and sums are formed alike whatever its neighbours see.
template <typename Arch>
struct KeyRange {
  int64_t begin, end;
  int64_t grid;                // the rows of a register tile
  int64_t sum_begin, sum_end;  // the part of it that products sum over

  // lanes: of the panel, as they decide the rows of its register tiles.
  KeyRange(const Extent& extent, int64_t from, int64_t padded, int64_t lanes) {
    const int64_t vecs = std::min<int64_t>(lanes / Arch::V::kLanes, Arch::kMaxVecs);
    grid = Arch::tile_rows(static_cast<int>(vecs));
    begin = std::max<int64_t>(extent.begin - from, 0) / grid * grid;
    end = std::min(round_up(extent.end - from, grid), padded);
    constexpr int64_t kStep = Arch::kOwnProduct ? Arch::kKeyStep : Arch::kPair;
    sum_begin = std::max<int64_t>(extent.begin - from, 0) / kStep * kStep;
    sum_end = std::min(round_up(extent.end - from, kStep), padded);
  }
  int64_t count() const { return end - begin; }
  int64_t sum_count() const { return sum_end - sum_begin; }
};

// Calls visit<kMasked>(begin, end) for all of [0, count), in order: without masks for the register
// tiles within [full_begin, full_end), where every lane sees every key.
template <typename Visit>
RA_INLINE void for_stretches(int64_t count, int64_t full_begin, int64_t full_end, int64_t grid,
                             const Visit& visit) {
  int64_t begin = round_up(std::clamp<int64_t>(full_begin, 0, count), grid);
  int64_t end = full_end < count ? full_end / grid * grid : count;
  if (begin >= end) begin = end = count;
  if (begin > 0) visit.template operator()<true>(0, begin);
  if (begin < end) visit.template operator()<false>(begin, end);
  if (end < count) visit.template operator()<true>(end, count);
}

}  // namespace
}  // namespace ring_attention::cpu
