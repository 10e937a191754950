// SPDX-License-Identifier: BSD-3-Clause
//
// Note [rows]. Where packing heads saves tiles (few queries: decoding, short chunks), the rows of a
// tile are the queries of all heads that share a K/V head, query by query, so that K and V are
// read once for the group and a tile is filled; neighbouring rows then see the same keys. Else a
// tile is of one head, and the heads of a group are neighbours in the grid.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace ring_attention::cuda {

__host__ __device__ constexpr int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t y) { return divide_up(x, y) * y; }

// The grid of query tiles: one-dimensional, later tiles of a head first (causal rows are the
// heavier the later they come).
struct QueryGrid {
  int heads, kv_heads, q_len;
  int packed;  // heads per tile
  int rows;    // packed q_len
  int tiles;   // per unit of packed heads

  static constexpr int64_t kMaxPackedRows = 1 << 20;

  static QueryGrid of(const AttentionParams& p, int tile_rows) {
    const int64_t group = p.heads / p.kv_heads;
    const int64_t apart = group * divide_up(p.q_len, tile_rows);
    const bool fewer = divide_up(group * p.q_len, tile_rows) < apart;
    const int64_t packed = fewer && group * p.q_len <= kMaxPackedRows ? group : 1;
    return {.heads = static_cast<int>(p.heads),
            .kv_heads = static_cast<int>(p.kv_heads),
            .q_len = static_cast<int>(p.q_len),
            .packed = static_cast<int>(packed),
            .rows = static_cast<int>(packed * p.q_len),
            .tiles = static_cast<int>(divide_up(packed * p.q_len, tile_rows))};
  }
  int64_t count(int64_t batch) const { return batch * (heads / packed) * tiles; }
};

// One tile of it, and which rows of the tensors its rows are.
struct QueryTile {
  const QueryGrid& grid;
  int batch, first_head, kv_head;
  int first;  // of the unit's rows

  RA_DEVICE QueryTile(const QueryGrid& grid, int index, int tile_rows) : grid(grid) {
    const int unit = index / grid.tiles, units = grid.heads / grid.packed;
    const int tile = grid.tiles - 1 - index % grid.tiles;
    batch = unit / units;
    first_head = unit % units * grid.packed;
    kv_head = first_head / (grid.heads / grid.kv_heads);
    first = tile * tile_rows;
  }

  // Rows beyond the last one are padding: computed, never read or written.
  RA_DEVICE bool real(int row) const { return first + row < grid.rows; }
  RA_DEVICE int head(int row) const {
    return grid.packed == 1 ? first_head : first_head + (first + row) % grid.packed;
  }
  // Padding stands for the last query.
  RA_DEVICE int query(int row) const { return min(first + row, grid.rows - 1) / grid.packed; }

  RA_DEVICE int64_t offset(int row, const Strides& stride) const {
    return batch * stride.batch + head(row) * stride.head + query(row) * stride.row;
  }
  // Of a row of [batch, heads, q_len], counted in rows.
  RA_DEVICE int64_t flat(int row, int heads) const {
    return (static_cast<int64_t>(batch) * heads + head(row)) * grid.q_len + query(row);
  }
};

}  // namespace ring_attention::cuda
