// SPDX-License-Identifier: BSD-3-Clause
//
// dK and dV, see Note [two kernels] in backward_config.h. One block of threads owns a tile of keys:
//
//   load K, V (they stay)
//   for each interval, tile of query rows that sees some of the keys, head of the group:
//     load Q, dO, what is known of each row, of the next one while this one is worked on
//     S^T = K Q^T;  dP^T = V dO^T
//     P = exp2(S - lse);  dS = P (dP - delta);  mask, only where some row does not see some key
//     dV += P^T dO;  dK += dS^T Q
//     on request: dQ += dS K, by atomics
//   dK, dV are added to the gradients
//
// Shared memory: K, V; two stages of Q, dO, lse, delta and intervals; dS, only for dQ.
// Registers: dK and dV, S and dP of a warp's 16 keys. Where these are too many, see
// keys_in_two_passes(), a launch sums only one of dK and dV.
#pragma once

#include "backward_dq.cuh"

namespace ring_attention::cuda::sm80 {

// What a launch of the keys kernel sums.
constexpr int kSumDk = 1, kSumDv = 2, kSumDq = 4;

// A tile of keys of one K/V head; a part of what sees them.
struct KeysTile {
  int64_t sample;
  int kv_head, block = 0, key, part;
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
    sample = index / call.kv_heads;
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

// Q, dO and what is known of each row, to stage 0 or 1.
template <typename Plan>
RA_DEVICE void load_queries(const BackwardCall& call, const KeysTile& keys,
                            const QueryWalk<Plan::kRows>& walk, uint32_t shared, int stage) {
  const int row = walk.tile * Plan::kStream;
  const uint32_t q = shared + Plan::kStages + stage * Plan::kStageBytes;
  Rows<Plan>::template load_queries<Plan::kStream>(call, keys.sample, walk.head, row, q,
                                                   q + Plan::kVStage);
  constexpr int kPairs = Plan::kStream / 2;
  if (threadIdx.x < Plan::kStream) {
    const int i = threadIdx.x;
    cp_async_16(shared + Plan::kStats + (stage * Plan::kStream + i) * 16,
                call.stats_of(keys.sample, walk.head) + row + i, 16);
  }
  if (threadIdx.x < kPairs) {
    const int i = threadIdx.x;
    cp_async_16(shared + Plan::kIntervals + (stage * kPairs + i) * 16,
                call.intervals_of(walk.run(call, keys), keys.sample) + row + 2 * i, 16);
  }
}

// To the gradients, or to this part's own: first all blocks' dK, one after another, then dV.
template <int kSums, int kDim8, int kVDim8>
RA_DEVICE void write_keys(const BackwardCall& call, const KeysTile& tile, int first_row,
                          const float (&dk)[kDim8][4], const float (&dv)[kVDim8][4]) {
  const KVBlock& block = call.blocks.block[tile.block];
  const int k_len = static_cast<int>(block.k_len);
  const int64_t row = (tile.sample * call.kv_heads + tile.kv_head) * block.k_len;
  const bool add = call.head_parts * call.row_parts == 1;
  int64_t before = 0, all = 0;
  for (int i = 0; i < call.blocks.count; ++i) {
    if (i == tile.block) before = all;
    all += call.blocks.block[i].k_len * call.batch * call.kv_heads;
  }
  float* part = call.partial + tile.part * all * (call.head_dim + call.v_head_dim);
  if constexpr ((kSums & kSumDk) != 0) {
    float* to = add ? static_cast<float*>(block.dk) : part + before * call.head_dim;
    write_sums(dk, call.scale, to + row * call.head_dim, tile.key + first_row, k_len, call.head_dim,
               add);
  }
  if constexpr ((kSums & kSumDv) != 0) {
    float* to =
        add ? static_cast<float*>(block.dv) : part + all * call.head_dim + before * call.v_head_dim;
    write_sums(dv, 1.0f, to + row * call.v_head_dim, tile.key + first_row, k_len, call.v_head_dim,
               add);
  }
}

// Leaves dS^T in shared memory, and which keys it is zero for.
template <typename Elem, int kStream, int kTiles>
RA_DEVICE void store_score_gradients(const float (&ds)[kTiles][4], int first_row, uint32_t to,
                                     uint16_t* used) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane / 4 + 8 * h;
    int any = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float low = ds[j][2 * h], high = ds[j][2 * h + 1];
      store_shared(to + TileLayout<kStream>::offset(row, j) + lane % 4 * 4, Elem::pack(low, high));
      any |= low != 0.0f || high != 0.0f;
    }
    any |= __shfl_xor_sync(kAllLanes, any, 1);
    any |= __shfl_xor_sync(kAllLanes, any, 2);
    if (lane % 4 == 0) used[row] = any ? 0xffff : 0;
  }
}

// dQ += dS K over all keys of the block's tile, in pieces of 16 rows x 16 columns per warp. Garbage
// in keys that none of these rows sees is sieved out: 0 NaN = NaN.
template <typename Plan>
RA_DEVICE void add_dq(const BackwardCall& call, const KeysTile& tile, int head, int first_query,
                      uint32_t ds, uint32_t k, const uint16_t* used) {
  using Elem = typename Plan::Element;
  constexpr int kBands = Plan::kStream / 16, kPieces = kBands * (Plan::kDim / 16);
  const int lane = threadIdx.x % 32;
  const uint32_t rows_lane =
      ds + TileLayout<Plan::kStream>::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const ColumnOperand<Plan::kDim> columns_of(k);
#pragma unroll 1
  for (int piece = threadIdx.x / 32; piece < kPieces; piece += Plan::kTiles.warps) {
    const int band = piece % kBands * 16, column = piece / kBands * 16;
    float sum[2][4] = {};
#pragma unroll
    for (int key = 0; key < Plan::kRows; key += 16) {
      uint32_t rows[4], columns[4];
      ldmatrix_x4_trans(rows, TileLayout<Plan::kStream>::advance(rows_lane, band / 8) +
                                  key * TileLayout<Plan::kStream>::kRowBytes);
      columns_of.load(columns, key, column);
      const auto* pairs = reinterpret_cast<const uint32_t*>(used + key) + lane % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) columns[i] &= pairs[i % 2 * 4];
      Elem::mma(sum[0], rows, columns[0], columns[1]);
      Elem::mma(sum[1], rows, columns[2], columns[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int query = first_query + band + lane / 4 + i / 2 % 2 * 8;
      const int d = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (query >= call.q_len || d >= call.head_dim) continue;
      const int64_t row = (tile.sample * call.heads + head) * call.q_len + query;
      atomicAdd(call.dq + row * call.head_dim + d, sum[i / 4][i % 4] * call.scale);
    }
  }
}

template <typename Elem, typename Dims, bool kLargeSmem, int kSums>
using KeysPlan = BackwardPlan<Elem, Dims, kLargeSmem, (kSums & kSumDq) != 0>;

template <typename Elem, typename Dims, bool kLargeSmem, int kSums>
__global__ void __launch_bounds__(KeysPlan<Elem, Dims, kLargeSmem, kSums>::kThreads)
    backward_keys(const __grid_constant__ BackwardCall call) {
  using Plan = KeysPlan<Elem, Dims, kLargeSmem, kSums>;
  constexpr int kDim = Dims::kQk, kVDim = Dims::kV;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t base = shared_address(memory), k = base + Plan::kKeep, v = base + Plan::kVKeep;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  const KeysTile tile(call, Plan::kRows);
  QueryWalk<Plan::kRows> walk;
  bool more = walk.next(call, tile);
  if (!more && call.head_parts * call.row_parts == 1) return;
  float dk[kDim / 8][4] = {}, dv[kVDim / 8][4] = {};
  if (more) {
    const KVBlock& block = call.blocks.block[tile.block];
    Rows<Plan>::template load_keys<Plan::kRows>(call, block, tile.sample, tile.kv_head, tile.key, 0,
                                                static_cast<int>(block.k_len), k, v);
    load_queries<Plan>(call, tile, walk, base, 0);
  }
  cp_async_commit();
  const int key = tile.key + first_row + lane / 4;  // and key + 8

  for (int stage = 0; more; stage ^= 1) {
    const bool masked = walk.masked();
    const int head = walk.head, first_query = walk.tile * Plan::kStream;
    more = walk.next(call, tile);
    if (more) load_queries<Plan>(call, tile, walk, base, stage ^ 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const uint32_t q = base + Plan::kStages + stage * Plan::kStageBytes, dout = q + Plan::kVStage;
    const int column = stage * Plan::kStream + lane % 4 * 2;
    const RowStats* stats = reinterpret_cast<RowStats*>(memory + Plan::kStats) + column;
    const KeyInterval* seen = reinterpret_cast<KeyInterval*>(memory + Plan::kIntervals) + column;
    float p[Plan::kStream / 8][4], ds[Plan::kStream / 8][4] = {};
    multiply<Elem, kDim>(p, k, first_row, q);
    if constexpr ((kSums & kSumDk) != 0) multiply<Elem, kVDim>(ds, v, first_row, dout);
    score_gradients<Elem>(
        p, ds, call, masked, [&](int j, int e, int) { return stats[8 * j + e]; },
        [&](int j, int e, int h) {
          const KeyInterval interval = seen[8 * j + e];
          return interval.begin <= key + 8 * h && key + 8 * h < interval.end;
        });
    if constexpr ((kSums & kSumDv) != 0) accumulate<Elem, kVDim, false>(dv, p, dout);
    if constexpr ((kSums & kSumDk) != 0) accumulate<Elem, kDim, false>(dk, ds, q);
    if constexpr ((kSums & kSumDq) != 0) {
      auto* used = reinterpret_cast<uint16_t*>(memory + Plan::kUsedKeys);
      const uint32_t gradients = base + Plan::kScoreGradients;
      store_score_gradients<Elem, Plan::kStream>(ds, first_row, gradients, used);
      __syncthreads();
      add_dq<Plan>(call, tile, head, first_query, gradients, k, used);
    }
    __syncthreads();
  }
  write_keys<kSums>(call, tile, first_row, dk, dv);
}

}  // namespace ring_attention::cuda::sm80
