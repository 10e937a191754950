// SPDX-License-Identifier: BSD-3-Clause
//
// The sm_90a backward on one page: the two kernels of sm80/backward_config.h, Note [two kernels],
// with warps as in the forward, and P and dS in registers all the way: what a product of 64 rows
// leaves there is what the next one takes as rows.
#pragma once

#include "../backward_call.cuh"
#include "../panel_layout.cuh"
#include "../tile_queue.cuh"
#include "warps.h"

namespace ring_attention::cuda::sm90 {

struct BackwardShape {
  int rows;     // that stay, 64 to each warpgroup that multiplies: of Q and dO, or of K and V
  int keys;     // that pass by at a time, for dQ
  int queries;  // and for dK and dV
  int stages;   // of tiles that pass by, in shared memory
};

// As long as registers allow: a lane has S and dP of a passing tile, and the sums. Measured on an
// H100 (8,192 tokens, 16 heads, TFLOP/s of the products made), passing keys: head dim 128 64 562,
// 80 575, 96 628; 96 96 521, 128 566. Head dim 64, passing queries: 64 441, 128 356 (it spills);
// three warpgroups, whose threads have fewer registers: 366.
constexpr BackwardShape backward_shape(int dim, int v_dim) {
  const int both = dim + v_dim;
  if (both <= 192) return {.rows = 128, .keys = 128, .queries = 64, .stages = 2};
  if (both <= 256) return {.rows = 128, .keys = 96, .queries = 64, .stages = 2};
  if (both <= 320) return {.rows = 128, .keys = 64, .queries = 32, .stages = 2};
  if (both <= 384) return {.rows = 128, .keys = 64, .queries = 64, .stages = 2};
  return {.rows = 128, .keys = 32, .queries = 32, .stages = 2};
}

// Where a thread's registers do not hold dK and dV both, the keys kernel is run once for each:
// eight products instead of seven.
constexpr bool keys_in_two_passes(int dim, int v_dim) { return dim + v_dim > 320; }

// Tiles and warps of one kernel: `passing` rows at a time.
template <typename Dims, BackwardShape kShape, int kPassingRows>
struct BackwardTile {
  static constexpr int kDim = Dims::kQk, kVDim = Dims::kV;
  static constexpr int kRows = kShape.rows, kPassing = kPassingRows, kStages = kShape.stages;
  static constexpr int kRangeRows = kShape.queries;  // see BackwardCall::ranges
  static constexpr WarpRoles kRoles = WarpRoles::of(kRows);

  using Kept = PanelLayout<kDim, kRows>;  // of Q or K
  using VKept = PanelLayout<kVDim, kRows>;
  using Stream = PanelLayout<kDim, kPassing>;  // of K or Q
  using VStream = PanelLayout<kVDim, kPassing>;
  using Queue = TileQueue<kStages, Stream::kBytes>;
  using VQueue = TileQueue<kStages, VStream::kBytes>;

  static_assert(kStages >= 2 && kPassing % 16 == 0 && kRows % kRangeRows == 0);

  struct Matrices {
    alignas(1024) unsigned char kept[Kept::kBytes];
    alignas(1024) unsigned char v_kept[VKept::kBytes];
    alignas(1024) unsigned char stream[kStages][Stream::kBytes];
    alignas(1024) unsigned char v_stream[kStages][VStream::kBytes];
    QueueBarriers<kStages> barriers, v_barriers;

    RA_DEVICE void init_barriers() {
      const int thread = static_cast<int>(threadIdx.x);
      if (thread >= kStages) return;
      barriers.init(thread, WarpRoles::kLoaders, kRoles.readers / 32);
      v_barriers.init(thread, WarpRoles::kLoaders, kRoles.readers / 32);
    }
  };
};

// What comes with a tile of passing keys.
struct PassingKeys {
  int last;  // there is none: the walk is over
  int masked, key, run;
};
// What comes with a tile of passing queries.
template <int kQueries>
struct PassingQueries {
  alignas(16) float lse[kQueries], minus_delta[kQueries];
  KeyInterval seen[kQueries];
  int last, masked;
};

}  // namespace ring_attention::cuda::sm90
