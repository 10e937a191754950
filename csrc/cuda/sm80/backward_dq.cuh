// SPDX-License-Identifier: BSD-3-Clause
//
// dQ, see Note [two kernels] in backward_config.h. One block of threads owns a tile of query rows:
//
//   load Q, dO (they stay)
//   for each K/V block, interval, key tile that some row sees:
//     load K, V of the next one while this one is worked on
//     S = Q K^T;  dP = dO V^T
//     P = exp2(S - lse);  dS = P (dP - delta);  mask, only where some row does not see some key
//     dQ += dS K
//   dQ is added to the gradient
//
// Shared memory: Q, dO; two stages of K, V. Registers: dQ, S and dP of a warp's 16 rows.
#pragma once

#include "backward_gradients.cuh"

namespace ring_attention::cuda::sm80 {

// A tile of query rows of one head; later rows first: causal ones are the heavier the later.
struct DqTile {
  int64_t sample;
  int head, kv_head, row, part;

  RA_DEVICE DqTile(const BackwardCall& call, int tile_rows) {
    const int tiles = static_cast<int>(divide_up(call.q_len, tile_rows));
    int64_t index = blockIdx.x;
    row = (tiles - 1 - static_cast<int>(index % tiles)) * tile_rows, index /= tiles;
    part = static_cast<int>(index % call.dq_parts), index /= call.dq_parts;
    head = static_cast<int>(index % call.heads);
    sample = index / call.heads;
    kv_head = head / (call.heads / call.kv_heads);
  }
};

// Walks over the key tiles that a tile of query rows sees, on a grid of kStream keys.
template <int kRows, int kStream>
struct KeyWalk {
  int block = 0, interval = -1, key = 0;
  RowsRange range{0, 0, 0, 0};

  RA_DEVICE int run(const BackwardCall& call) const { return call.first_run[block] + interval; }

  // To the next one; false: there is none.
  RA_DEVICE bool next(const BackwardCall& call, const DqTile& tile) {
    key += kStream * call.dq_parts;
    while (key >= range.end) {
      if (block >= call.blocks.count) return false;
      if (++interval >= call.blocks.block[block].intervals) {
        ++block, interval = -1, range.end = 0, key = 0;
        continue;
      }
      const RowsRange* ranges = call.ranges_of(run(call), tile.sample) + tile.row / kStream;
      range = ranges[0];
#pragma unroll 1
      for (int i = 1; i < kRows / kStream; ++i) range.add(ranges[i]);
      // The first tile of this part that is not before the range.
      const int first = range.begin / kStream, parts = call.dq_parts;
      if (range.begin < range.end) {
        key = (first + (tile.part - first % parts + parts) % parts) * kStream;
      }
    }
    return true;
  }
  RA_DEVICE bool masked(const BackwardCall& call) const {
    const int64_t k_len = call.blocks.block[block].k_len;
    return !range.covers(key, static_cast<int>(min(k_len, static_cast<int64_t>(key) + kStream)));
  }
};

// Keys that no row of the tile sees read as zeros.
template <typename Plan>
RA_DEVICE void load_keys(const BackwardCall& call, const DqTile& tile,
                         const KeyWalk<Plan::kRows, Plan::kStream>& walk, uint32_t stage) {
  Rows<Plan>::template load_keys<Plan::kStream>(call, call.blocks.block[walk.block], tile.sample,
                                                tile.kv_head, walk.key, walk.range.begin,
                                                walk.range.end, stage, stage + Plan::kVStage);
}

template <typename Elem, typename Dims, bool kLargeSmem>
__global__ void __launch_bounds__(BackwardPlan<Elem, Dims, kLargeSmem>::kThreads)
    backward_dq(const __grid_constant__ BackwardCall call) {
  using Plan = BackwardPlan<Elem, Dims, kLargeSmem>;
  constexpr int kDim = Dims::kQk, kVDim = Dims::kV;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t q = shared_address(memory) + Plan::kKeep, dout = q + Plan::kVKeep;
  const uint32_t stages = q + Plan::kStages;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  const DqTile tile(call, Plan::kRows);
  KeyWalk<Plan::kRows, Plan::kStream> walk;
  bool more = walk.next(call, tile);
  if (!more && call.dq_parts == 1) return;
  float dq[kDim / 8][4] = {};
  if (more) {
    Rows<Plan>::template load_queries<Plan::kRows>(call, tile.sample, tile.head, tile.row, q, dout);
    load_keys<Plan>(call, tile, walk, stages);
  }
  cp_async_commit();
  const int row = tile.row + first_row + lane / 4;  // and row + 8
  const RowStats* stats = call.stats_of(tile.sample, tile.head) + row;
  const RowStats row_stats[2] = {stats[0], stats[8]};

  for (int stage = 0; more; stage ^= 1) {
    const bool masked = walk.masked(call);
    const int key = walk.key + lane % 4 * 2;
    const KeyInterval* seen = call.intervals_of(walk.run(call), tile.sample) + row;
    KeyInterval interval[2] = {};
    if (masked) interval[0] = seen[0], interval[1] = seen[8];
    more = walk.next(call, tile);
    if (more) {
      load_keys<Plan>(call, tile, walk, stages + (stage ^ 1) * Plan::kStageBytes);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const uint32_t k = stages + stage * Plan::kStageBytes, v = k + Plan::kVStage;
    float s[Plan::kStream / 8][4], ds[Plan::kStream / 8][4];
    multiply<Elem, kDim>(s, q, first_row, k);
    multiply<Elem, kVDim>(ds, dout, first_row, v);
    score_gradients<Elem>(
        s, ds, call, masked, [&](int, int, int h) { return row_stats[h]; },
        [&](int j, int e, int h) {
          return interval[h].begin <= key + 8 * j + e && key + 8 * j + e < interval[h].end;
        });
    if (masked || std::is_same_v<Elem, Float32>) {
      accumulate<Elem, kDim, true>(dq, ds, k);
    } else {
      accumulate<Elem, kDim, false>(dq, ds, k);
    }
    __syncthreads();
  }
  const int64_t rows = (tile.sample * call.heads + tile.head) * call.q_len;
  const int64_t part = tile.part * call.batch * call.heads * call.q_len;
  float* to = call.dq_parts > 1 ? call.partial + (part + rows) * call.head_dim
                                : call.dq + rows * call.head_dim;
  write_sums(dq, call.scale, to, tile.row + first_row, call.q_len, call.head_dim,
             call.dq_parts == 1);
}

}  // namespace ring_attention::cuda::sm80
