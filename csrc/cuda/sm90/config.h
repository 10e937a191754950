// SPDX-License-Identifier: BSD-3-Clause
//
// The sm_90a forward on one page: its tiles per head-dim bucket, its warps and its shared memory.
#pragma once

#include "../key_ranges.cuh"
#include "../panel_layout.cuh"
#include "../tile_queue.cuh"
#include "warps.h"

namespace ring_attention::cuda::sm90 {

struct ForwardShape {
  int rows;    // 64 to each warpgroup that multiplies
  int keys;    // of a key tile
  int stages;  // tiles of K, and of V, in shared memory
};

// Three warpgroups where registers hold their sums and enough keys, else two. As measured on an
// H100 (8,192 tokens, 16 heads, TFLOP/s full and causal), rows x keys: head dim 64 192 x 128 420
// and 360, 256 x 64 424 and 307, 128 x 128 359 and 305; 96 192 x 96 520 and 461, 128 x 128 516 and
// 434; 128 128 x 128 597 and 526, 192 x 80 583 and 522 (the same run; 620 and 531 in another);
// 192/128 128 x 128 693, x 96 665; 192 128 x 96 684, x 80 664; 256 128 x 80 738, x 64 722.
template <int kQkDim, int kVDim>
constexpr ForwardShape forward_shape() {
  if (kQkDim <= 64) return {.rows = 192, .keys = 128, .stages = 2};
  if (kQkDim <= 96) return {.rows = 192, .keys = 96, .stages = 2};
  if (kQkDim <= 192 && kVDim <= 128) return {.rows = 128, .keys = 128, .stages = 2};
  if (kQkDim <= 192) return {.rows = 128, .keys = 96, .stages = 2};
  return {.rows = 128, .keys = 80, .stages = 2};
}

template <int kQkDim, int kVDim, ForwardShape kShape = forward_shape<kQkDim, kVDim>()>
struct ForwardTile {
  static constexpr int kQk = kQkDim, kV = kVDim;
  static constexpr int kRows = kShape.rows, kKeys = kShape.keys, kStages = kShape.stages;

  static constexpr WarpRoles kRoles = WarpRoles::of(kRows);
  static constexpr int kThreads = kRoles.threads, kWarpRows = 16;

  using Query = PanelLayout<kQk, kRows>;
  using Keys = PanelLayout<kQk, kKeys>;
  using Values = PanelLayout<kV, kKeys>;
  using KeyQueue = TileQueue<kStages, Keys::kBytes>;
  using ValueQueue = TileQueue<kStages, Values::kBytes>;

  struct SharedMemoryPlan {
    alignas(1024) unsigned char q[Query::kBytes];
    alignas(1024) unsigned char k[kStages][Keys::kBytes];
    alignas(1024) unsigned char v[kStages][Values::kBytes];
    QueueBarriers<kStages> k_barriers, v_barriers;
    KeyPlan plan;
  };
  static constexpr int kSmemBytes = sizeof(SharedMemoryPlan);
  static_assert(kSmemBytes <= kMostSmemBytes && kStages >= 2 && kKeys % 16 == 0);
};

}  // namespace ring_attention::cuda::sm90
