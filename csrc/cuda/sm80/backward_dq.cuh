// SPDX-License-Identifier: BSD-3-Clause
//
// dQ, see Note [two kernels] in backward_config.h. One block of threads owns a tile of query rows:
//
//   load Q, dO (they stay)
//   for each K/V block, interval, key tile that some row sees:
//     load K, V of the next one while this one is worked on
//     S = Q K^T;  dP = dO V^T                       of a warp's rows and its part of the keys
//     P = exp2(S - lse);  dS = P (dP - delta);  mask, only where some row does not see some key
//     dS to shared memory; all warps wait for one another
//     dQ += dS K                                    of a warp's rows and its part of the columns
//   dQ is added to the gradient
//
// Shared memory: Q, dO; two stages of K, V; dS. Registers: dQ, S and dP of a warp; Q and dO, where
// they fit.
#pragma once

#include "../backward_walks.cuh"
#include "backward_gradients.cuh"

namespace ring_attention::cuda::sm80 {

// Keys that no row of the tile sees read as zeros.
template <typename Plan>
RA_DEVICE void load_keys(const BackwardCall& call, const DqTile& tile,
                         const KeyWalk<Plan::kRows, Plan::kStream, Plan::kStream>& walk,
                         uint32_t stage) {
  Rows<Plan>::template load_keys<Plan::kStream>(call, call.blocks.block[walk.block], tile.sample,
                                                tile.kv_head, walk.key, walk.range.begin,
                                                walk.range.end, stage, stage + Plan::kVStage);
}

// Of a warp's rows those that a lane has.
template <int kLaneRows, typename T>
RA_DEVICE void load_rows(T (&to)[kLaneRows], const T* from) {
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) to[r] = from[8 * r];
}

template <typename Elem, typename Dims, bool kLargeSmem>
__global__ void __launch_bounds__(BackwardPlan<Elem, Dims, kLargeSmem, kSumDq>::kThreads)
    backward_dq(const __grid_constant__ BackwardCall call) {
  using Plan = BackwardPlan<Elem, Dims, kLargeSmem, kSumDq>;
  constexpr int kDim = Dims::kQk, kVDim = Dims::kV, kLaneRows = 2 * Plan::kBands;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const WarpPlace<Plan> at;
  const DqTile tile(call, Plan::kRows);
  KeyWalk<Plan::kRows, Plan::kStream, Plan::kStream> walk;
  bool more = walk.next(call, tile);
  if (!more && call.dq_parts == 1) return;
  float dq[Plan::kBands][Plan::template kSumTiles<kDim>][4] = {};
  KeptRows<Plan, kDim> q(base + Plan::kKeep, at.row);
  KeptRows<Plan, kVDim> dout(base + Plan::kVKeep, at.row);
  const WeightTile<Plan> weights{base + Plan::kDs};
  if (more) {
    Rows<Plan>::template load_queries<Plan::kRows>(call, tile.sample, tile.head, tile.row,
                                                   base + Plan::kKeep, base + Plan::kVKeep);
    load_keys<Plan>(call, tile, walk, base + Plan::kStages);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    q.keep(), dout.keep();
  }
  const int lane = threadIdx.x % 32, row = tile.row + at.row + lane / 4;
  const int64_t at_row = call.first_row(tile.sample, tile.head) + row;
  float lse[kLaneRows], lse_low[kLaneRows] = {}, minus_delta[kLaneRows];
  load_rows(lse, call.row_lse + at_row);
  load_rows(minus_delta, call.minus_delta + at_row);
  if constexpr (std::is_same_v<Elem, Float32>) load_rows(lse_low, call.row_lse_low + at_row);

  for (int stage = 0; more; stage ^= 1) {
    const uint32_t k = base + Plan::kStages + stage * Plan::kStageBytes, v = k + Plan::kVStage;
    const bool masked = walk.masked(call);
    const int side = at.side * 8 * Plan::kScoreTiles, key = walk.key + side + lane % 4 * 2;
    KeyInterval seen[kLaneRows] = {};
    if (masked) load_rows(seen, call.intervals_of(walk.run(call), tile.sample) + row);
    more = walk.next(call, tile);
    cp_async_wait<0>();
    __syncthreads();  // K and V are there, and the last ones and their dS not needed any more
    if (more)
      load_keys<Plan>(call, tile, walk, base + Plan::kStages + (stage ^ 1) * Plan::kStageBytes);
    cp_async_commit();
    float s[Plan::kBands][Plan::kScoreTiles][4], ds[Plan::kBands][Plan::kScoreTiles][4];
    multiply(s, q, k, side, [](int, int, int) { return 0.0f; });
    multiply(ds, dout, v, side, [&](int, int, int r) { return minus_delta[r]; });
    score_gradients<Elem>(
        s, ds, call, masked, [&](int, int, int r) { return RowLse{lse[r], lse_low[r]}; },
        [&](int j, int e, int r) { return seen[r].has(key + 8 * j + e); });
    weights.store(ds, at);
    __syncthreads();
    if (masked) {
      accumulate<kDim, true>(dq, weights, at, k);
    } else {
      accumulate<kDim, false>(dq, weights, at, k);
    }
  }
  const int64_t rows = static_cast<int64_t>(tile.sample * call.heads + tile.head) * call.q_len;
  const int64_t part = tile.part * call.batch * call.heads * call.q_len;
  float* to = call.dq_parts > 1 ? call.partial + (part + rows) * call.head_dim
                                : call.dq + rows * call.head_dim;
  write_sums<Plan>(dq, at, call.scale, to, tile.row, call.q_len, call.head_dim, call.dq_parts == 1);
}

}  // namespace ring_attention::cuda::sm80
