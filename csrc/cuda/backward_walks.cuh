// SPDX-License-Identifier: BSD-3-Clause
//
// The tiles that blocks of the backward kernels own, and their ways over those that pass by: a tile
// of query rows over the keys it sees, a tile of keys over the query rows that see it.
#pragma once

#include "backward_call.cuh"

namespace ring_attention::cuda {

// A tile of query rows of one head; later rows first: causal ones are the heavier the later.
struct DqTile {
  int sample, head, kv_head, row, part;

  RA_DEVICE DqTile(const BackwardCall& call, int tile_rows) {
    const int tiles = static_cast<int>(divide_up(call.q_len, tile_rows));
    int64_t index = blockIdx.x;
    row = (tiles - 1 - static_cast<int>(index % tiles)) * tile_rows, index /= tiles;
    part = static_cast<int>(index % call.dq_parts), index /= call.dq_parts;
    head = static_cast<int>(index % call.heads);
    sample = static_cast<int>(index / call.heads);
    kv_head = head / (call.heads / call.kv_heads);
  }
};

// Walks over the key tiles that a tile of kRows query rows sees, on a grid of kKeys keys. Ranges
// are known of kRangeRows rows at a time.
template <int kRows, int kKeys, int kRangeRows>
struct KeyWalk {
  static_assert(kRows % kRangeRows == 0);

  int block = 0, interval = -1, key = 0;
  RowsRange range{0, 0, 0, 0};

  RA_DEVICE int run(const BackwardCall& call) const { return call.first_run[block] + interval; }

  // To the next one; false: there is none.
  RA_DEVICE bool next(const BackwardCall& call, const DqTile& tile) {
    key += kKeys * call.dq_parts;
    while (key >= range.end) {
      if (block >= call.blocks.count) return false;
      if (++interval >= call.blocks.block[block].intervals) {
        ++block, interval = -1, range.end = 0, key = 0;
        continue;
      }
      const RowsRange* ranges = call.ranges_of(run(call), tile.sample) + tile.row / kRangeRows;
      range = ranges[0];
#pragma unroll 1
      for (int i = 1; i < kRows / kRangeRows; ++i) range.add(ranges[i]);
      // The first tile of this part that is not before the range.
      const int first = range.begin / kKeys, parts = call.dq_parts;
      if (range.begin < range.end) {
        key = (first + (tile.part - first % parts + parts) % parts) * kKeys;
      }
    }
    return true;
  }
  RA_DEVICE bool masked(const BackwardCall& call) const {
    const int64_t k_len = call.blocks.block[block].k_len;
    return !range.covers(key, static_cast<int>(min(k_len, static_cast<int64_t>(key) + kKeys)));
  }
};

// A tile of keys of one K/V head; a part of what sees them.
struct KeysTile {
  int sample, kv_head, block = 0, key, part;
  int head_begin, head_end, row_part;

  RA_DEVICE KeysTile(const BackwardCall& call, int tile_rows) {
    int64_t tiles = 0, index = blockIdx.x;
    for (int i = 0; i < call.blocks.count; ++i) {
      tiles += divide_up(call.blocks.block[i].k_len, tile_rows);
    }
    int64_t first = index % tiles;
    index /= tiles;
    for (; first >= divide_up(call.blocks.block[block].k_len, tile_rows); ++block) {
      first -= divide_up(call.blocks.block[block].k_len, tile_rows);
    }
    key = static_cast<int>(first) * tile_rows;
    const int parts = call.head_parts * call.row_parts, group = call.heads / call.kv_heads;
    part = static_cast<int>(index % parts), index /= parts;
    kv_head = static_cast<int>(index % call.kv_heads);
    sample = static_cast<int>(index / call.kv_heads);
    const int head_part = part / call.row_parts;
    row_part = part % call.row_parts;
    head_begin = kv_head * group + group * head_part / call.head_parts;
    head_end = kv_head * group + group * (head_part + 1) / call.head_parts;
  }
};

// The place of the lowest bit set.
RA_DEVICE int lowest(uint32_t bits) { return __popc(~bits & (bits - 1)); }

// Walks over the (interval, tile of query rows, head) that see some of a tile's keys. A warp looks
// at 32 tiles at a time, and before that at 32 groups of 32: windows and documents are found among
// many rows without reading about all. All warps find the same.
template <int kKeys>
struct QueryWalk {
  int interval = -1, first_group = 0, base = 0, tile = 0, head = 0;
  uint32_t groups = 0;           // of the 32 groups from `first_group`, those yet to be looked at
  uint32_t found = 0, full = 0;  // of the 32 tiles from `base`

  // To the next one; false: there is none.
  RA_DEVICE bool next(const BackwardCall& call, const KeysTile& keys) {
    if (found != 0 && ++head < keys.head_end) return true;
    found &= found - 1;
    head = keys.head_begin;
    const int lane = threadIdx.x % 32;
    const int end = static_cast<int>(
        min(call.blocks.block[keys.block].k_len, static_cast<int64_t>(keys.key) + kKeys));
    while (found == 0) {
      RowsRange range{INT_MAX, 0, INT_MAX, 0};
      if (groups == 0) {
        first_group += 32;
        if (interval < 0 || first_group >= call.tile_groups()) {
          first_group = 0;
          if (++interval >= call.blocks.block[keys.block].intervals) return false;
        }
        const int mine = first_group + lane;
        if (mine < call.tile_groups()) range = call.groups_of(run(call, keys), keys.sample)[mine];
        groups = __ballot_sync(kAllLanes, range.touches(keys.key, end));
        continue;
      }
      base = 32 * (first_group + lowest(groups));
      groups &= groups - 1;
      const int mine = base + lane;
      if (mine < call.tiles() && mine % call.row_parts == keys.row_part) {
        range = call.ranges_of(run(call, keys), keys.sample)[mine];
      }
      found = __ballot_sync(kAllLanes, range.touches(keys.key, end));
      full = __ballot_sync(kAllLanes, range.covers(keys.key, end));
    }
    tile = base + lowest(found);
    return true;
  }
  RA_DEVICE int run(const BackwardCall& call, const KeysTile& keys) const {
    return call.first_run[keys.block] + interval;
  }
  RA_DEVICE bool masked() const { return (full >> (tile - base) & 1) == 0; }
};

// Where dK and dV of a tile's head go, [k_len, head_dim] each: to the gradients, or to this part's
// own, where all blocks' dK lie one after another, then dV.
struct KeysTarget {
  float *dk, *dv;
  bool add;  // to what is there

  RA_DEVICE KeysTarget(const BackwardCall& call, const KeysTile& tile)
      : add(call.head_parts * call.row_parts == 1) {
    const KVBlock& block = call.blocks.block[tile.block];
    int64_t before = 0, all = 0;
    for (int i = 0; i < call.blocks.count; ++i) {
      if (i == tile.block) before = all;
      all += call.blocks.block[i].k_len * call.batch * call.kv_heads;
    }
    float* part = call.partial + tile.part * all * (call.head_dim + call.v_head_dim);
    const int64_t row =
        (static_cast<int64_t>(tile.sample) * call.kv_heads + tile.kv_head) * block.k_len;
    dk =
        (add ? static_cast<float*>(block.dk) : part + before * call.head_dim) + row * call.head_dim;
    dv = (add ? static_cast<float*>(block.dv)
              : part + all * call.head_dim + before * call.v_head_dim) +
         row * call.v_head_dim;
  }
};

}  // namespace ring_attention::cuda
