// SPDX-License-Identifier: BSD-3-Clause
//
// dK and dV, see Note [two kernels] in backward_config.h. One block of threads owns a tile of keys:
//
//   load K, V (they stay)
//   for each interval, tile of query rows that sees some of the keys, head of the group:
//     load Q, dO, what is known of each row, of the next one while this one is worked on
//     S^T = K Q^T;  dP^T = V dO^T                   of a warp's keys and its part of the rows
//     P = exp2(S - lse);  dS = P (dP - delta);  mask, only where some row does not see some key
//     P, dS to shared memory; all warps wait for one another
//     dV += P^T dO;  dK += dS^T Q                   of a warp's keys and its part of the columns
//     on request: dQ += dS K, by atomics            a piece to a warp
//   dK, dV are added to the gradients
//
// Shared memory: K, V; two stages of Q, dO, lse, delta and intervals; P, dS. Registers: dK and dV,
// S and dP of a warp; K and V, where they fit. Where these are too many, see keys_in_two_passes(),
// a launch sums only one of dK and dV.
#pragma once

#include "backward_dq.cuh"

namespace ring_attention::cuda::sm80 {

// Q, dO and what is known of each row, to stage 0 or 1.
template <typename Plan>
RA_DEVICE void load_queries(const BackwardCall& call, const KeysTile& keys,
                            const QueryWalk<Plan::kRows>& walk, uint32_t shared, int stage) {
  const int row = walk.tile * Plan::kStream;
  const uint32_t q = shared + Plan::kStages + stage * Plan::kStageBytes;
  Rows<Plan>::template load_queries<Plan::kStream>(call, keys.sample, walk.head, row, q,
                                                   q + Plan::kVStage);
  // Copies of 16 bytes, a thread each.
  const uint32_t to = shared + Plan::kQueries + stage * Plan::kQueryBytes + threadIdx.x * 16;
  if (threadIdx.x < Plan::kStream / 4) {
    const int64_t at = call.first_row(keys.sample, walk.head) + row + 4 * threadIdx.x;
    cp_async_16(to + Plan::kLse, call.row_lse + at, 16);
    cp_async_16(to + Plan::kMinusDelta, call.minus_delta + at, 16);
    if constexpr (std::is_same_v<typename Plan::Element, Float32>) {
      cp_async_16(to + Plan::kLseLow, call.row_lse_low + at, 16);
    }
  }
  if (threadIdx.x < Plan::kStream / 2) {
    const KeyInterval* of_run = call.intervals_of(walk.run(call, keys), keys.sample);
    cp_async_16(to + Plan::kIntervals, of_run + row + 2 * threadIdx.x, 16);
  }
}

template <typename Plan, int kSums, int kBands, int kDkTiles, int kDvTiles>
RA_DEVICE void write_keys(const BackwardCall& call, const KeysTile& tile, const WarpPlace<Plan>& at,
                          const float (&dk)[kBands][kDkTiles][4],
                          const float (&dv)[kBands][kDvTiles][4]) {
  const int k_len = static_cast<int>(call.blocks.block[tile.block].k_len);
  const KeysTarget target(call, tile);
  if constexpr ((kSums & kSumDk) != 0) {
    write_sums(dk, at, call.scale, target.dk, tile.key, k_len, call.head_dim, target.add);
  }
  if constexpr ((kSums & kSumDv) != 0) {
    write_sums(dv, at, 1.0f, target.dv, tile.key, k_len, call.v_head_dim, target.add);
  }
}

// How dQ of a passing tile, kStream x kDim, is cut into pieces: one for a warp at most.
template <typename Plan>
struct DqPieces {
  static constexpr int kWarps = Plan::kThreads / 32;
  static constexpr int kUnits = (Plan::kStream / 16) * (Plan::kDim / 16);  // 16 x 16
  static constexpr int kOfPiece = static_cast<int>(divide_up(kUnits, kWarps));
  static constexpr int kBands = kOfPiece % 2 == 0 && Plan::kStream % 32 == 0 ? 2 : 1;
  static constexpr int kTiles = kOfPiece / kBands * 2;  // of 8 columns
  static constexpr int kDown = Plan::kStream / (16 * kBands), kAcross = Plan::kDim / (8 * kTiles);
  static_assert(kDown * kAcross <= kWarps && 8 * kTiles * kAcross == Plan::kDim);
};

// dQ += dS K over all keys of the block's tile.
template <typename Plan, bool kSieve>
RA_DEVICE void add_dq(const BackwardCall& call, const KeysTile& tile, int head, int first_query,
                      uint32_t ds, uint32_t k) {
  using Pieces = DqPieces<Plan>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = warp % Pieces::kAcross, row = warp / Pieces::kAcross * 16 * Pieces::kBands;
  if (row >= Plan::kStream) return;
  float sum[Pieces::kBands][Pieces::kTiles][4] = {};
  accumulate<typename Plan::Element, Plan::kDim, Plan::kRows, Pieces::kAcross, kSieve>(
      sum, WeightColumns<Plan>(ds, row), k, across);
  const int64_t of_head = static_cast<int64_t>(tile.sample * call.heads + head) * call.q_len;
#pragma unroll
  for (int r = 0; r < 2 * Pieces::kBands; ++r) {
    const int query = first_query + row + lane / 4 + 8 * r;
    if (query >= call.q_len) continue;
    float* to = call.dq + (of_head + query) * call.head_dim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Pieces::kTiles; ++j) {
      const int column = 16 * (j / 2 * Pieces::kAcross + across) + 8 * (j % 2);
      if (column >= call.head_dim) break;
      const float* x = sum[r / 2][j] + r % 2 * 2;
      atomicAdd(to + column, x[0] * call.scale);
      atomicAdd(to + column + 1, x[1] * call.scale);
    }
  }
}

template <typename Elem, typename Dims, bool kLargeSmem, int kSums>
__global__ void __launch_bounds__(BackwardPlan<Elem, Dims, kLargeSmem, kSums>::kThreads)
    backward_keys(const __grid_constant__ BackwardCall call) {
  using Plan = BackwardPlan<Elem, Dims, kLargeSmem, kSums>;
  constexpr int kDim = Dims::kQk, kVDim = Dims::kV;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const WarpPlace<Plan> at;
  const KeysTile tile(call, Plan::kRows);
  QueryWalk<Plan::kRows> walk;
  bool more = walk.next(call, tile);
  if (!more && call.head_parts * call.row_parts == 1) return;
  float dk[Plan::kBands][Plan::template kSumTiles<kDim>][4] = {};
  float dv[Plan::kBands][Plan::template kSumTiles<kVDim>][4] = {};
  KeptRows<Plan, kDim> k(base + Plan::kKeep, at.row);
  KeptRows<Plan, kVDim> v(base + Plan::kVKeep, at.row);
  const WeightTile<Plan> p_tile{base + Plan::kP}, ds_tile{base + Plan::kDs};
  if (more) {
    const KVBlock& block = call.blocks.block[tile.block];
    Rows<Plan>::template load_keys<Plan::kRows>(call, block, tile.sample, tile.kv_head, tile.key, 0,
                                                static_cast<int>(block.k_len), base + Plan::kKeep,
                                                base + Plan::kVKeep);
    load_queries<Plan>(call, tile, walk, base, 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    k.keep(), v.keep();
  }
  const int lane = threadIdx.x % 32, key = tile.key + at.row + lane / 4;

  for (int stage = 0; more; stage ^= 1) {
    const uint32_t q = base + Plan::kStages + stage * Plan::kStageBytes, dout = q + Plan::kVStage;
    const int side = at.side * 8 * Plan::kScoreTiles;
    const unsigned char* queries = memory + Plan::kQueries + stage * Plan::kQueryBytes;
    const int column = side + lane % 4 * 2;
    const auto* lse = reinterpret_cast<const float*>(queries + Plan::kLse) + column;
    const auto* lse_low = reinterpret_cast<const float*>(queries + Plan::kLseLow) + column;
    const auto* minus_delta = reinterpret_cast<const float*>(queries + Plan::kMinusDelta) + column;
    const auto* seen = reinterpret_cast<const KeyInterval*>(queries + Plan::kIntervals) + column;
    const bool masked = walk.masked();
    [[maybe_unused]] const int head = walk.head, first_query = walk.tile * Plan::kStream;
    more = walk.next(call, tile);
    cp_async_wait<0>();
    __syncthreads();  // Q and dO are there, and the last ones and their weights not needed any more
    if (more) load_queries<Plan>(call, tile, walk, base, stage ^ 1);
    cp_async_commit();
    float p[Plan::kBands][Plan::kScoreTiles][4], ds[Plan::kBands][Plan::kScoreTiles][4] = {};
    multiply(p, k, q, side, [](int, int, int) { return 0.0f; });
    if constexpr (Plan::kWantsDs) {
      multiply(ds, v, dout, side, [&](int j, int e, int) { return minus_delta[8 * j + e]; });
    }
    score_gradients<Elem>(
        p, ds, call, masked,
        [&](int j, int e, int) {
          const bool low = std::is_same_v<Elem, Float32>;
          return RowLse{lse[8 * j + e], low ? lse_low[8 * j + e] : 0.0f};
        },
        [&](int j, int e, int r) { return seen[8 * j + e].has(key + 8 * r); });
    if constexpr (Plan::kWantsP) p_tile.store(p, at);
    if constexpr (Plan::kWantsDs) ds_tile.store(ds, at);
    __syncthreads();
    if constexpr ((kSums & kSumDv) != 0) accumulate<kVDim, false>(dv, p_tile, at, dout);
    if constexpr ((kSums & kSumDk) != 0) accumulate<kDim, false>(dk, ds_tile, at, q);
    if constexpr ((kSums & kSumDq) != 0) {
      const uint32_t keys = base + Plan::kKeep;
      if (masked) {
        add_dq<Plan, true>(call, tile, head, first_query, ds_tile.tile, keys);
      } else {
        add_dq<Plan, false>(call, tile, head, first_query, ds_tile.tile, keys);
      }
    }
  }
  write_keys<Plan, kSums>(call, tile, at, dk, dv);
}

}  // namespace ring_attention::cuda::sm80
