// SPDX-License-Identifier: BSD-3-Clause
//
// The sm_90a forward on one page: its tiles per head-dim bucket, its warps and its shared memory.
#pragma once

#include "../key_ranges.cuh"
#include "../panel_layout.cuh"
#include "../tile_queue.cuh"

namespace ring_attention::cuda::sm90 {

constexpr int kMostSmemBytes = 227 * 1024;  // one block may ask for
constexpr int kMostRegisters = 64 * 1024;   // of a multiprocessor

struct ForwardShape {
  int rows;    // 64 to each warpgroup that multiplies
  int keys;    // of a key tile
  int stages;  // tiles of K, and of V, in shared memory
};

template <int kQkDim, int kVDim>
constexpr ForwardShape forward_shape() {
  if (kQkDim <= 64) return {.rows = 192, .keys = 128, .stages = 2};
  if (kQkDim <= 128) return {.rows = 128, .keys = 128, .stages = 2};
  if (kQkDim <= 192 && kVDim <= 128) return {.rows = 128, .keys = 128, .stages = 2};
  if (kQkDim <= 192) return {.rows = 128, .keys = 96, .stages = 2};
  return {.rows = 128, .keys = 64, .stages = 2};
}

template <int kQkDim, int kVDim, ForwardShape kShape = forward_shape<kQkDim, kVDim>()>
struct ForwardTile {
  static constexpr int kQk = kQkDim, kV = kVDim;
  static constexpr int kRows = kShape.rows, kKeys = kShape.keys, kStages = kShape.stages;

  // Warpgroups that multiply, each 64 rows, and after them one that loads: half of it K, half V.
  static constexpr int kGroups = kRows / 64, kReaders = kGroups * 128, kThreads = kReaders + 128;
  static constexpr int kWarpRows = 16, kLoaders = 64;
  // Registers of a thread, in eights: all begin with as many, then loaders give some to readers.
  static constexpr int kRegisters = kMostRegisters / kThreads / 8 * 8;
  static constexpr int kLoaderRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kReaderRegisters =
      (kRegisters * (kGroups + 1) - kLoaderRegisters) / kGroups / 8 * 8;

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
