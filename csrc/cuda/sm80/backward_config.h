// SPDX-License-Identifier: BSD-3-Clause
//
// The backward kernels on one page: tiles, what lies in shared memory, what a launch is told.
//
// Note [two kernels]. dQ is summed by tiles of query rows that walk over keys (backward_dq.cuh), dK
// and dV by tiles of keys that walk over query rows (backward_keys.cuh). Both recompute the scores,
// and no two blocks of a grid write the same memory: seven products where five would do with
// atomics, and the same bits every time. The two are one data flow: 16 rows per warp stay, tiles of
// `stream` rows pass by, and
//   dQ kernel: rows = Q, dO;  stream = K, V     S = Q K^T    dP = dO V^T                  dQ += dS
//   K keys:      rows = K, V;   stream = Q, dO    S^T = K Q^T  dP^T = V dO^T  dV += P^T dO  dK +=
//   dS^T Q
// In both P and dS leave the products in the registers in which the next product wants them.
#pragma once

#include "../../dispatch.h"
#include "../state.cuh"
#include "config.h"

namespace ring_attention::cuda::sm80 {

struct BackwardTiles {
  int warps;   // of 16 rows each
  int stream;  // rows of a passing tile

  constexpr int rows() const { return 16 * warps; }
  constexpr int threads() const { return 32 * warps; }
};

// As many warps as there is room for, so that what passes by is shared by many; and a stream as
// wide as the registers allow: dK and dV of 16 keys take (head_dim + v_head_dim) / 2 of them, S and
// dP take `stream`.
constexpr BackwardTiles backward_tiles(int element_bytes, int dim, int v_dim, bool large_smem,
                                       bool atomic_dq) {
  const int both = dim + v_dim;
  if (element_bytes == 4) {  // one size serves both
    if (both <= 192) return {4, 32};
    if (both <= 256) return {4, 16};
    return both <= 384 ? BackwardTiles{2, 16} : BackwardTiles{2, 8};
  }
  if (both <= 128) return {8, 64};
  if (both <= 192) return {8, 32};
  if (both <= 256) return atomic_dq && !large_smem ? BackwardTiles{4, 32} : BackwardTiles{8, 32};
  if (both <= 384) return large_smem ? BackwardTiles{8, 32} : BackwardTiles{4, 32};
  return large_smem ? BackwardTiles{8, 16} : BackwardTiles{4, 16};
}

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
constexpr bool same_tiles(int element_bytes, int dim, int v_dim, bool atomic_dq) {
  const BackwardTiles large = backward_tiles(element_bytes, dim, v_dim, true, atomic_dq);
  const BackwardTiles small = backward_tiles(element_bytes, dim, v_dim, false, atomic_dq);
  return large.warps == small.warps && large.stream == small.stream;
}

// What a row's P and dS are formed with. lse in log2 units, in two parts; +inf for a row that saw
// nothing, so that its P is 0.
struct __align__(16) RowStats {
  float lse, delta, lse_low, unused;
};

// What a run of query rows sees of an interval: some row the keys [begin, end), all rows the keys
// [full_begin, full_end).
struct __align__(16) RowsRange {
  int begin, end, full_begin, full_end;

  RA_DEVICE bool touches(int from, int to) const { return begin < to && from < end; }
  RA_DEVICE bool covers(int from, int to) const { return full_begin <= from && to <= full_end; }
  RA_DEVICE void add(const RowsRange& other) {
    begin = min(begin, other.begin);
    end = max(end, other.end);
    full_begin = max(full_begin, other.full_begin);
    full_end = min(full_end, other.full_end);
  }
};

// The arguments of every backward kernel, by value. Rows are counted to `padded`, a multiple of
// every tile; a run is an interval of a block, runs are counted over the blocks of the launch.
struct BackwardCall {
  const char *q, *dout;
  Strides q_stride, dout_stride;  // in bytes
  KVBlocks blocks;                // strides of k and v in bytes
  int first_run[kMaxBlocks + 1];
  int64_t batch;
  int heads, kv_heads, q_len, padded, stream;
  int head_dim, v_head_dim;
  ScoreScale score;
  float scale;
  bool softcap, atomic_dq;
  float* dq;
  const float *lse, *delta;

  // Written by the kernels of backward_rows.cu, read by the others.
  RowStats* stats;         // [batch, heads, padded]
  KeyInterval* intervals;  // [runs, batch, padded]
  RowsRange* ranges;       // [runs, batch, tiles()], of `stream` rows each
  RowsRange* groups;       // [runs, batch, tile_groups()], of 32 tiles each

  // Note [parts]. Where a grid would be too small, its sums are cut into parts, by shape, which a
  // kernel of its own adds up in order. A part of dQ takes every parts-th key tile; one of dK and
  // dV some of the heads of a group and every row_parts-th tile of their rows.
  int dq_parts, head_parts, row_parts;
  float* partial;  // [parts][the gradient]; null: one part, added to the gradient itself

  __host__ __device__ int tiles() const { return padded / stream; }
  __host__ __device__ int tile_groups() const { return (tiles() + 31) / 32; }

  RA_DEVICE const RowsRange* ranges_of(int run, int64_t sample) const {
    return ranges + (run * batch + sample) * tiles();
  }
  RA_DEVICE const RowsRange* groups_of(int run, int64_t sample) const {
    return groups + (run * batch + sample) * tile_groups();
  }
  RA_DEVICE const KeyInterval* intervals_of(int run, int64_t sample) const {
    return intervals + (run * batch + sample) * padded;
  }
  RA_DEVICE const RowStats* stats_of(int64_t sample, int head) const {
    return stats + (sample * heads + head) * padded;
  }
};

// Tiles and shared memory of one bucket.
template <typename Elem, typename Dims, bool kLargeSmem, bool kAtomicDq = false>
struct BackwardPlan {
  using Element = Elem;
  static constexpr int kDim = Dims::kQk, kVDim = Dims::kV;
  static constexpr BackwardTiles kTiles =
      backward_tiles(sizeof(Elem), kDim, kVDim, kLargeSmem, kAtomicDq);
  static constexpr int kRows = kTiles.rows(), kThreads = kTiles.threads();
  static constexpr int kStream = kTiles.stream;
  static constexpr int kRowBytes = kDim * sizeof(Elem), kVRowBytes = kVDim * sizeof(Elem);

  // Offsets. The rows that stay: Q and dO, or K and V. Then two stages of those that pass.
  static constexpr int kKeep = 0;
  static constexpr int kVKeep = kKeep + kRows * kRowBytes;
  static constexpr int kStages = kVKeep + kRows * kVRowBytes;
  static constexpr int kVStage = kStream * kRowBytes;  // within a stage
  static constexpr int kStageBytes = kVStage + kStream * kVRowBytes;
  static constexpr int kDqBytes = kStages + 2 * kStageBytes;
  // The keys kernel: what the queries of each stage need besides.
  static constexpr int kStats = kDqBytes;
  static constexpr int kIntervals = kStats + 2 * kStream * static_cast<int>(sizeof(RowStats));
  // And dS^T [rows][stream], if dQ is summed; per row, whether it holds anything but zeros.
  static constexpr int kScoreGradients =
      kIntervals + 2 * kStream * static_cast<int>(sizeof(KeyInterval));
  static constexpr int kUsedKeys = kScoreGradients + (kAtomicDq ? kRows * kStream * 2 : 0);
  static constexpr int kKeysBytes = kUsedKeys + (kAtomicDq ? kRows * 2 : 0);
  static_assert(kKeysBytes <= (kLargeSmem ? kLargeSmemBytes : kSmallSmemBytes));
};

}  // namespace ring_attention::cuda::sm80
