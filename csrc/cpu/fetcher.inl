// SPDX-License-Identifier: BSD-3-Clause
//
// Note [fetching]. What a forward reads next is fetched into the L2 cache while products run, some
// lines per register tile (so not where an ISA has a product of its own); all at once, it would
// have to be waited for:
//   the next key block of the tile, of which each panel that takes the one in hand fetches a part
//   the rows of the next panel, while the one before it takes its first key block
//   with the last key block of a tile, the first of both of the tile that the thread takes next
// To fetch what is never read, or lies beyond the last row, does no harm; so rows of a panel are
// taken for those of one head.
#pragma once

#include "tile.inl"

namespace ring_attention::cpu {
namespace {

template <typename Arch>
class Fetcher {
  using Elem = typename Arch::Elem;
  using State = typename Arch::State;

 public:
  // The first row of a tile, of one problem.
  struct Place {
    int64_t batch, kv_head, row;
  };

  Fetcher(const ForwardParams& params, const QueryTile<Arch>& tile, int64_t kv_head,
          int64_t key_block)
      : p_(params), tile_(tile), kv_head_(kv_head), key_block_(key_block) {}

  void set_next_tile(const Place& place) { next_tile_ = place; }

  // For as long as `panels` panels take the key block before the one at `from`, of intervals n.
  void begin_keys(const KVBlock& block, int64_t n, int64_t from, int64_t panels) {
    k_ = v_ = {};
    const bool last = &block == p_.blocks + p_.num_blocks - 1 && n == block.intervals - 1;
    ends_tile_ = last && from >= tile_.span.end && next_tile_.row >= 0;
    if (from < tile_.span.end) {
      set_keys(block, tile_.batch, kv_head_, from);
    } else if (ends_tile_) {
      set_first_keys();
    }
    parts_ = panels;
    part_ = -1;
  }

  // While panel u takes of a key block the keys `range`; fresh: its first ones.
  void begin_panel(int64_t u, KeyRange<Arch> range, bool fresh) {
    ++part_;
    q_ = state_ = {};
    rows_per_tile_ = divide_up(tile_.panel, divide_up(range.count(), range.grid));
    if (fresh && u + 1 < tile_.panels()) {
      const int64_t row = (u + 1) * tile_.panel;
      set_panel(tile_.batch, tile_.head[row], tile_.query[row]);
    } else if (ends_tile_ && part_ == parts_ - 1) {
      const QueryRows& rows = tile_.query_rows;
      set_panel(next_tile_.batch, next_tile_.kv_head * rows.group + rows.head(next_tile_.row),
                rows.index(next_tile_.row));
    } else {
      rows_per_tile_ = 0;
    }
  }

  // While the register tile of the keys [key, key + kKeys) is formed, `row` rows into the range.
  template <int kKeys>
  RA_INLINE void fetch(int64_t key, int64_t row) const {
    for (int64_t line = part_; line < k_.lines + v_.lines; line += parts_) {
      const bool of_k = line < k_.lines;
      const Rows& rows = of_k ? k_ : v_;
      for (int i = 0; i < kKeys; ++i) rows.fetch(key + i, of_k ? line : line - k_.lines);
    }
    const int64_t begin = row / kKeys * rows_per_tile_;
    for (int64_t i = begin; i < std::min(begin + rows_per_tile_, tile_.panel); ++i) {
      for (int64_t line = 0; line < q_.lines; ++line) q_.fetch(i, line);
      for (int64_t line = 0; line < state_.lines; ++line) state_.fetch(i, line);
    }
  }

 private:
  struct Rows {
    const char* first = nullptr;
    int64_t row_bytes = 0, lines = 0;

    Rows() = default;
    template <typename T>
    Rows(const T* row, int64_t stride, int64_t dim)
        : first(reinterpret_cast<const char*>(row)),
          row_bytes(stride * static_cast<int64_t>(sizeof(T))),
          lines(divide_up(dim * static_cast<int64_t>(sizeof(T)), kCacheLine)) {}

    RA_INLINE void fetch(int64_t row, int64_t line) const {
      __builtin_prefetch(first + row * row_bytes + line * kCacheLine, 0, 2);
    }
  };

  static Rows rows_of(const void* data, const Strides& stride, int64_t b, int64_t head, int64_t row,
                      int64_t dim) {
    const int64_t at = b * stride.batch + head * stride.head + row * stride.row;
    return {static_cast<const Elem*>(data) + at, stride.row, dim};
  }

  void set_keys(const KVBlock& block, int64_t b, int64_t kv_head, int64_t from) {
    k_ = rows_of(block.k, block.k_stride, b, kv_head, from, p_.head_dim);
    v_ = rows_of(block.v, block.v_stride, b, kv_head, from, p_.v_head_dim);
  }

  // Of the next tile's first row.
  void set_first_keys() {
    const KVBlock& block = p_.blocks[0];
    if (block.intervals == 0) return;
    const Intervals intervals(block, 0, next_tile_.batch);
    const int64_t begin = intervals.of(tile_.query_rows.index(next_tile_.row)).begin;
    if (begin >= block.k_len) return;
    set_keys(block, next_tile_.batch, next_tile_.kv_head, begin / key_block_ * key_block_);
  }

  void set_panel(int64_t b, int64_t head, int64_t query) {
    q_ = rows_of(p_.q, p_.q_stride, b, head, query, p_.head_dim);
    if (p_.first) return;
    const int64_t row = (b * p_.heads + head) * p_.q_len + query;
    state_ = {static_cast<const State*>(p_.acc) + row * p_.v_head_dim, p_.v_head_dim,
              p_.v_head_dim};
  }

  const ForwardParams& p_;
  const QueryTile<Arch>& tile_;
  const int64_t kv_head_, key_block_;
  Place next_tile_ = {.batch = 0, .kv_head = 0, .row = -1};  // -1: none
  bool ends_tile_ = false;
  Rows k_, v_, q_, state_;
  int64_t parts_ = 1, part_ = 0, rows_per_tile_ = 0;
};

}  // namespace
}  // namespace ring_attention::cpu
