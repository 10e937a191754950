// SPDX-License-Identifier: BSD-3-Clause
//
// What a tile of query rows sees, found before any key is loaded. Each interval of each K/V block
// is a run of keys: some row sees the keys of [begin, end), all rows see those of [full_begin,
// full_end). So a run is a partial stretch, a full one and a partial one; key tiles, on a fixed
// grid, ask for masks row by row only in the partial ones.
#pragma once

#include <climits>

#include "query_rows.cuh"
#include "shared_tile.cuh"

namespace ring_attention::cuda {

constexpr int kMaxBlocks = 8;  // of one launch: longer lists are several launches
constexpr int kMaxRuns = 8;    // planned at a time
constexpr unsigned kAllLanes = 0xffffffffu;

// The blocks of a call as kernels take them, by value.
struct KVBlocks {
  KVBlock block[kMaxBlocks];
  int count = 0;

  // The blocks [first, first + kMaxBlocks) of a call, as far as there are.
  static KVBlocks of(const AttentionParams& p, int64_t first) {
    KVBlocks blocks;
    for (int64_t i = first; i < p.num_blocks && blocks.count < kMaxBlocks; ++i) {
      blocks.block[blocks.count++] = p.blocks[i];
    }
    return blocks;
  }
};

// Keys of one query row, clamped to the block. Empty: begin = INT_MAX, end = 0, so that it never
// widens a union and always empties an intersection.
struct KeyInterval {
  int begin, end;

  RA_DEVICE bool has(int key) const { return begin <= key && key < end; }
  // Together they are one interval.
  RA_DEVICE bool touches(const KeyInterval& other) const {
    return begin <= other.end && other.begin <= end;
  }
};

struct KeyRun {
  const char *k, *v;                   // of this sample and K/V head
  int64_t k_row, v_row;                // strides, in bytes
  const int32_t *key_begin, *key_end;  // of this sample and interval
  int64_t begin_row, end_row;
  int k_len;
  int begin, end, full_begin, full_end;
  int whole;  // each key of [begin, end) is seen by some row; 0: perhaps not

  RA_DEVICE KeyRun(const KVBlock& block, const QueryTile& tile, int n, int element_bytes)
      : k(static_cast<const char*>(block.k) +
          (tile.batch * block.k_stride.batch + tile.kv_head * block.k_stride.head) * element_bytes),
        v(static_cast<const char*>(block.v) +
          (tile.batch * block.v_stride.batch + tile.kv_head * block.v_stride.head) * element_bytes),
        k_row(block.k_stride.row * element_bytes),
        v_row(block.v_stride.row * element_bytes),
        key_begin(block.key_begin + n * block.begin_stride.head +
                  tile.batch * block.begin_stride.batch),
        key_end(block.key_end + n * block.end_stride.head + tile.batch * block.end_stride.batch),
        begin_row(block.begin_stride.row),
        end_row(block.end_stride.row),
        k_len(static_cast<int>(block.k_len)) {}

  RA_DEVICE KeyInterval of_query(int query) const {
    const int from = max(__ldg(key_begin + query * begin_row), 0);
    const int to = min(__ldg(key_end + query * end_row), k_len);
    return from < to ? KeyInterval{from, to} : KeyInterval{INT_MAX, 0};
  }
  RA_DEVICE bool covers(int from, int to) const { return full_begin <= from && to <= full_end; }

  // Finds the four numbers of the first kRows rows of a tile. All lanes of a warp.
  template <int kRows>
  RA_DEVICE void see(const QueryTile& tile) {
    begin = full_end = INT_MAX;
    end = full_begin = 0;
    whole = 1;
    for (int row = threadIdx.x % 32; row < kRows; row += 32) {
      const KeyInterval seen = of_query(tile.query(row));
      const KeyInterval next = of_query(tile.query(min(row + 1, kRows - 1)));
      begin = min(begin, seen.begin);
      end = max(end, seen.end);
      full_begin = max(full_begin, seen.begin);
      full_end = min(full_end, seen.end);
      whole &= seen.touches(next);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      begin = min(begin, __shfl_xor_sync(kAllLanes, begin, lanes));
      end = max(end, __shfl_xor_sync(kAllLanes, end, lanes));
      full_begin = max(full_begin, __shfl_xor_sync(kAllLanes, full_begin, lanes));
      full_end = min(full_end, __shfl_xor_sync(kAllLanes, full_end, lanes));
      whole &= __shfl_xor_sync(kAllLanes, whole, lanes);
    }
  }

  // Leaves the keys [from, to) of it.
  RA_DEVICE void clip(int64_t from, int64_t to) {
    const auto key = [](int64_t x) {
      return static_cast<int>(min(max(x, int64_t{0}), int64_t{INT_MAX}));
    };
    begin = max(begin, key(from));
    end = min(end, key(to));
  }
};

// Keys counted over all blocks of a launch, each padded to whole key tiles: what a part of a call
// that is split over keys takes. Multiples of the key tile.
struct KeyPart {
  int64_t begin, end;
};

// Some runs of a launch, in shared memory.
struct KeyPlan {
  alignas(KeyRun) unsigned char memory[kMaxRuns * sizeof(KeyRun)];
  int count, more;  // more: there are runs after these

  RA_DEVICE KeyRun& run(int i) { return reinterpret_cast<KeyRun*>(memory)[i]; }

  // The runs [first, first + kMaxRuns), for the first kRows rows of a tile. By the first `warps`
  // warps of a block; barriers before (the last plan is not used any more) and after are the
  // caller's.
  template <int kRows, int kKeys>
  RA_DEVICE void make(const KVBlocks& blocks, const QueryTile& tile, int first, int element_bytes,
                      KeyPart part, int warps) {
    const int warp = threadIdx.x / 32;
    int at = -first;
    int64_t offset = 0;
    for (int i = 0; i < blocks.count; ++i) {
      const KVBlock& block = blocks.block[i];
      for (int n = 0; n < static_cast<int>(block.intervals); ++n, ++at) {
        if (at < 0 || at >= kMaxRuns || at % warps != warp) continue;
        KeyRun found(block, tile, n, element_bytes);
        found.see<kRows>(tile);
        found.clip(part.begin - offset, part.end - offset);
        if (threadIdx.x % 32 == 0) run(at) = found;
      }
      offset += round_up(block.k_len, kKeys);
    }
    if (threadIdx.x == 0) {
      count = min(at, kMaxRuns);
      more = at > kMaxRuns;
    }
  }
};

// Walks the key tiles of a plan: the run, and the first key of a tile of kKeys keys on the block's
// fixed grid. What is asked for every tile is not read from the plan again, see Note [waits].
template <int kKeys>
struct KeyCursor {
  int run = 0, from = 0;

  RA_DEVICE explicit KeyCursor(KeyPlan& plan) { settle(plan); }
  RA_DEVICE bool done() const { return from >= end_; }
  RA_DEVICE void next(KeyPlan& plan) {
    from += kKeys;
    if (from < end_) return;
    ++run;
    settle(plan);
  }

 private:
  // To the first tile of the next run that has keys.
  RA_DEVICE void settle(KeyPlan& plan) {
    end_ = from;  // done, unless a run follows
    for (; run < plan.count; ++run) {
      const KeyRun& found = plan.run(run);
      if (found.begin >= found.end) continue;
      from = found.begin / kKeys * kKeys;
      end_ = found.end;
      return;
    }
  }

  int end_;  // of the run
};

// Calls clear(key), with all lanes of a warp, for each key of a tile that no row sees: what lies
// there (NaN, perhaps) would be multiplied by P = 0. `from` is the first key of the tile. All
// threads of a block, between barriers.
template <int kRows, int kKeys, typename Clear>
RA_DEVICE void for_unseen_keys(const KeyRun& run, const QueryTile& tile, int from,
                               const Clear& clear) {
  KeyInterval seen[kRows / 32];
#pragma unroll
  for (int i = 0; i < kRows / 32; ++i) {
    seen[i] = run.of_query(tile.query(i * 32 + static_cast<int>(threadIdx.x) % 32));
  }
  for (int key = threadIdx.x / 32; key < kKeys; key += blockDim.x / 32) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) any |= seen[i].has(from + key);
    if (!__any_sync(kAllLanes, any)) clear(key);
  }
}

// Zeros in their place in a tile of rows of K or V.
template <int kRows, int kKeys, int kDim>
RA_DEVICE void clear_unseen(uint32_t rows_tile, const KeyRun& run, const QueryTile& tile,
                            int from) {
  for_unseen_keys<kRows, kKeys>(run, tile, from, [&](int key) {
    for (int chunk = threadIdx.x % 32; chunk < TileLayout<kDim>::kChunks; chunk += 32) {
      store_shared(rows_tile + TileLayout<kDim>::offset(key, chunk), make_uint4(0, 0, 0, 0));
    }
  });
}

}  // namespace ring_attention::cuda
