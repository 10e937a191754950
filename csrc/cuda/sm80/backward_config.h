// SPDX-License-Identifier: BSD-3-Clause
//
// The backward kernels on one page: tiles, and what lies in shared memory.
//
// Note [two kernels]. dQ is summed by tiles of query rows that walk over keys (backward_dq.cuh), dK
// and dV by tiles of keys that walk over query rows (backward_keys.cuh). Both recompute the scores,
// and no two blocks of a grid write the same memory: seven products where five would do with
// atomics, and the same bits every time. The two are one data flow: a tile of rows stays, tiles of
// `stream` rows pass by, and
//   dQ:    rows = Q, dO   stream = K, V    S = Q K^T     dP = dO V^T     dQ += dS K
//   keys:  rows = K, V    stream = Q, dO   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO  dK += dS^T Q
//
// Note [warps of a tile]. What bounds these products is how much their operands are read from
// shared memory, and that falls with the size of a warp's piece in both directions. So warps stand
// in a grid, `row_warps` by `sides`. For scores, a warp owns its rows (32 where there is room, two
// bands of 16 that share what is read of the stream) and its side's part of the stream; P and dS,
// rounded to the element type, go to shared memory; and then a warp sums its rows and its side's
// part of the columns. Two barriers per passing tile: it has arrived, and the weights are there.
#pragma once

#include "../backward_call.cuh"
#include "config.h"

namespace ring_attention::cuda::sm80 {

struct BackwardTiles {
  int row_warps, sides;  // the grid of warps
  int warp_rows;         // 16 or 32
  int stream;            // rows of a passing tile

  constexpr int rows() const { return row_warps * warp_rows; }
  constexpr int threads() const { return 32 * row_warps * sides; }
  constexpr bool operator==(const BackwardTiles&) const = default;
};

// A stream as wide as shared memory and the registers allow: with two sides and 32 rows, a lane has
// S and dP in `stream` of them, dK and dV in (head_dim + v_head_dim) / 2. As many rows as leave
// room for a second block on a multiprocessor, which works while the other one waits at a barrier:
// on an H100 64 rows are 20% quicker than 128 in one block (head dim 64). Where two do not fit, as
// many rows as one has room for, so that what passes by is shared by many.
constexpr BackwardTiles backward_tiles(int element_bytes, int dim, int v_dim, bool large_smem) {
  const int both = dim + v_dim;
  if (element_bytes == 4) {  // one size serves both
    if (both <= 128) return {2, 2, 32, 32};
    if (both <= 192) return {2, 2, 32, 16};
    return both <= 384 ? BackwardTiles{2, 2, 16, 16} : BackwardTiles{2, 1, 16, 8};
  }
  if (both <= 64) return {2, 2, 32, 64};
  if (both <= 128) return {large_smem ? 2 : 4, 2, 32, 64};
  if (both <= 192) return large_smem ? BackwardTiles{4, 2, 32, 64} : BackwardTiles{4, 2, 32, 32};
  if (both <= 256) return large_smem ? BackwardTiles{4, 2, 32, 64} : BackwardTiles{2, 2, 32, 32};
  if (both <= 320) return large_smem ? BackwardTiles{4, 2, 32, 32} : BackwardTiles{2, 2, 32, 32};
  if (both <= 384) return large_smem ? BackwardTiles{4, 2, 32, 32} : BackwardTiles{4, 1, 16, 16};
  return large_smem ? BackwardTiles{2, 2, 32, 32} : BackwardTiles{4, 1, 16, 16};
}

// Which of the two tiles a device takes. Of 192/128 two blocks of the small ones fit into 227 KB
// (9.0, 10.0), and are 12% quicker there.
constexpr bool takes_large_tiles(int smem_optin_bytes, int dim, int v_dim) {
  const bool two_small = dim + v_dim == 320 && smem_optin_bytes >= 227 * 1024;
  return smem_optin_bytes >= kLargeSmemBytes && !two_small;
}

// Whether a warp's rows of what stays are kept in registers, not read again for every passing tile.
constexpr bool rows_in_registers(int element_bytes, int dim, int v_dim) {
  return element_bytes == 2 && dim + v_dim <= 128;
}

// What a launch sums.
constexpr int kSumDk = 1, kSumDv = 2, kSumDq = 4;

// Where the two accumulators of the keys kernel do not fit into registers, it is run once for each:
// eight products instead of seven, but no spills.
constexpr bool keys_in_two_passes(int dim, int v_dim) { return dim + v_dim > 320; }

// Note [atomics]. On request, BackwardParams::deterministic, the keys kernel also sums dQ, by
// atomics: five products, and sums whose order changes from run to run. Not for float32, whose
// products are what costs, nor where dK and dV take two passes already: these stay deterministic.
constexpr bool has_atomic_dq(int element_bytes, int dim, int v_dim) {
  return element_bytes == 2 && !keys_in_two_passes(dim, v_dim);
}

// Whether the tiles are the same for both sizes of shared memory: then there is one kernel.
constexpr bool same_tiles(int element_bytes, int dim, int v_dim) {
  return backward_tiles(element_bytes, dim, v_dim, true) ==
         backward_tiles(element_bytes, dim, v_dim, false);
}

// Tiles and shared memory of one kernel: a bucket of head dims, and what it sums.
template <typename Elem, typename Dims, bool kLargeSmem, int kSums>
struct BackwardPlan {
  using Element = Elem;
  static constexpr int kDim = Dims::kQk, kVDim = Dims::kV;
  static constexpr BackwardTiles kTiles = backward_tiles(sizeof(Elem), kDim, kVDim, kLargeSmem);
  static constexpr int kRows = kTiles.rows(), kThreads = kTiles.threads();
  static constexpr int kStream = kTiles.stream;
  static constexpr bool kInRegisters = rows_in_registers(sizeof(Elem), kDim, kVDim);
  static constexpr bool kKeys = kSums != kSumDq;  // keys stay, queries pass by
  static constexpr bool kWantsP = (kSums & kSumDv) != 0, kWantsDs = (kSums & ~kSumDv) != 0;

  // A warp's share.
  static constexpr int kSides = kTiles.sides, kWarpRows = kTiles.warp_rows;
  static constexpr int kBands = kWarpRows / 16;             // of 16 rows
  static constexpr int kScoreTiles = kStream / kSides / 8;  // of 8 columns of S
  template <int kColumns>
  static constexpr int kSumTiles = kColumns / kSides / 8;

  static constexpr int kRowBytes = kDim * sizeof(Elem), kVRowBytes = kVDim * sizeof(Elem);
  // fp32 weights lie transposed, see backward_products_fp32.cuh.
  static constexpr int kWeightBytes =
      sizeof(Elem) == 4 ? kStream * (kRows + 4) * 4 : kRows * kStream * 2;

  // Offsets. The rows that stay: Q and dO, or K and V. Then two stages of those that pass, and the
  // weights of the sums.
  static constexpr int kKeep = 0;
  static constexpr int kVKeep = kKeep + kRows * kRowBytes;
  static constexpr int kStages = kVKeep + kRows * kVRowBytes;
  static constexpr int kVStage = kStream * kRowBytes;  // within a stage
  static constexpr int kStageBytes = kVStage + kStream * kVRowBytes;
  static constexpr int kP = kStages + 2 * kStageBytes;
  static constexpr int kDs = kP + (kWantsP ? kWeightBytes : 0);
  // The keys kernel: what the queries of each stage need besides.
  static constexpr int kQueries = kDs + (kWantsDs ? kWeightBytes : 0);
  static constexpr int kLse = 0, kMinusDelta = kStream * 4, kIntervals = kStream * 8;  // of a stage
  static constexpr int kLseLow = kStream * 16;
  static constexpr int kQueryBytes = kStream * (sizeof(Elem) == 4 ? 20 : 16);
  static constexpr int kSmemBytes = kQueries + (kKeys ? 2 * kQueryBytes : 0);
  static_assert(kSmemBytes <= (kLargeSmem ? kLargeSmemBytes : kSmallSmemBytes));
};

// A warp's place in the grid.
template <typename Plan>
struct WarpPlace {
  int row, side;

  RA_DEVICE WarpPlace() {
    const int warp = threadIdx.x / 32;
    row = warp / Plan::kSides * Plan::kWarpRows;
    side = warp % Plan::kSides;
  }
};

}  // namespace ring_attention::cuda::sm80
