// SPDX-License-Identifier: BSD-3-Clause
//
// The sm_80 kernels on one page: tiles and shared memory of the forward per head-dim bucket.
#pragma once

#include "../key_ranges.cuh"

namespace ring_attention::cuda::sm80 {

// The two classes of devices: 163 KB of shared memory for a block (8.0, and all with more) and 99
// KB (8.6, 8.9, 12.0). A multiprocessor has 1 KB more than that, and every block takes 1 KB of it.
constexpr int kLargeSmemBytes = 163 * 1024, kSmallSmemBytes = 99 * 1024;

// Note [forward tiles]. 32 query rows to a warp halve what is read from shared memory, compared
// with 16: they are taken while a warp's registers hold O (rows x v_head_dim), S of a key tile and
// the fragments in hand. Key tiles are then as long as registers allow, stages as many as leave
// room for a second block on a multiprocessor, or, where it does not fit, for the one. At head dim
// 128 two stages of long tiles are the quickest, as measured on an H100, keys x stages: 32 x 5 300
// TFLOP/s, 48 x 4 309, 48 x 2 323, 64 x 3 333, 64 x 2 359; 16 rows to a warp, three blocks: 64 x 2
// 283. Others were not tried at other head dims.
struct ForwardShape {
  int warps;
  int warp_rows;  // query rows of a warp: 16 or 32
  int keys;       // of a key tile
  int stages;     // tiles of K or V in shared memory
  int blocks;     // on a multiprocessor, what registers are limited for

  constexpr int rows() const { return warps * warp_rows; }
  constexpr int threads() const { return warps * 32; }
};

// Note [few rows]. Decoding reads every key for a handful of rows, so that memory is the bound: one
// band of rows to a warp, and small blocks, several on a multiprocessor, that between them keep
// 48 KB or more on its way (two or three tiles of each) and have a warp for each tensor core.
constexpr int kFewRows = 32;

template <int kQkDim>
constexpr ForwardShape few_rows_shape() {
  if (kQkDim <= 32) return {.warps = 2, .warp_rows = 16, .keys = 64, .stages = 4, .blocks = 4};
  if (kQkDim <= 64) return {.warps = 2, .warp_rows = 16, .keys = 64, .stages = 3, .blocks = 4};
  if (kQkDim <= 96) return {.warps = 2, .warp_rows = 16, .keys = 32, .stages = 4, .blocks = 4};
  if (kQkDim <= 128) return {.warps = 2, .warp_rows = 16, .keys = 32, .stages = 3, .blocks = 4};
  if (kQkDim <= 192) return {.warps = 2, .warp_rows = 16, .keys = 32, .stages = 3, .blocks = 3};
  return {.warps = 2, .warp_rows = 16, .keys = 16, .stages = 3, .blocks = 3};
}

// What a tile is chosen for.
enum class TileFor { kFewRows, kLargeSmem, kSmallSmem };

template <int kQkDim, int kVDim>
constexpr ForwardShape forward_shape(TileFor use) {
  const bool large_smem = use == TileFor::kLargeSmem;
  if (use == TileFor::kFewRows) return few_rows_shape<kQkDim>();
  if (kQkDim <= 32) return {.warps = 4, .warp_rows = 32, .keys = 64, .stages = 4, .blocks = 2};
  if (kQkDim <= 64) return {.warps = 4, .warp_rows = 32, .keys = 64, .stages = 4, .blocks = 2};
  if (kQkDim <= 96) {
    if (large_smem) return {.warps = 4, .warp_rows = 32, .keys = 48, .stages = 4, .blocks = 2};
    return {.warps = 4, .warp_rows = 32, .keys = 32, .stages = 4, .blocks = 2};
  }
  if (kQkDim <= 128) {
    if (large_smem) return {.warps = 4, .warp_rows = 32, .keys = 64, .stages = 2, .blocks = 2};
    return {.warps = 4, .warp_rows = 32, .keys = 32, .stages = 2, .blocks = 2};
  }
  if (kQkDim <= 192 && kVDim <= 128) {
    if (large_smem) return {.warps = 4, .warp_rows = 32, .keys = 32, .stages = 2, .blocks = 2};
    return {.warps = 4, .warp_rows = 16, .keys = 32, .stages = 2, .blocks = 2};
  }
  if (kQkDim <= 192) {
    if (large_smem) return {.warps = 8, .warp_rows = 16, .keys = 64, .stages = 4, .blocks = 1};
    return {.warps = 4, .warp_rows = 16, .keys = 32, .stages = 2, .blocks = 2};
  }
  if (large_smem) return {.warps = 8, .warp_rows = 16, .keys = 64, .stages = 3, .blocks = 1};
  return {.warps = 8, .warp_rows = 16, .keys = 32, .stages = 2, .blocks = 1};
}

// A forward kernel's numbers, as a type. Uses with the same shape share a kernel.
template <int kQkDim, int kVDim, ForwardShape kShape>
struct ForwardTile {
  static constexpr int kQk = kQkDim, kV = kVDim;
  static constexpr int kRows = kShape.rows(), kKeys = kShape.keys, kStages = kShape.stages;
  static constexpr int kThreads = kShape.threads(), kBlocks = kShape.blocks;
  static constexpr int kWarpRows = kShape.warp_rows;

  // Q stays; K and V tiles take turns in the ring: K, V, K, V, ...
  struct SharedMemoryPlan {
    alignas(128) uint16_t q[kRows * kQk];
    uint16_t ring[kStages][kKeys * (kQk > kV ? kQk : kV)];
    KeyPlan plan;
  };
  static constexpr int kSmemBytes = sizeof(SharedMemoryPlan);
  static_assert(kStages >= 2 && kKeys % 16 == 0);

  static constexpr bool fit(int blocks, int device_bytes) {
    return blocks * (kSmemBytes + 1024) <= device_bytes + 1024;
  }
};

template <typename Dims, TileFor kUse>
struct ForwardTileFor {
  using Tile = ForwardTile<Dims::kQk, Dims::kV, forward_shape<Dims::kQk, Dims::kV>(kUse)>;
  // Few rows are one tile for all devices: small ones have two of its blocks.
  static_assert(kUse != TileFor::kFewRows || Tile::fit(2, kSmallSmemBytes));
  static_assert(Tile::fit(Tile::kBlocks,
                          kUse == TileFor::kSmallSmem ? kSmallSmemBytes : kLargeSmemBytes));
};

// fp32 inputs: 8 rows to a warp, a key to a lane for S, a column to a lane for O. Head dims are
// those of the call, kDim bounds them: 64, 128 or 256.
template <int kMaxDim>
struct Fp32Tile {
  static constexpr int kDim = kMaxDim;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kWarpRows = 8;
  static constexpr int kRows = kWarps * kWarpRows, kKeys = 32;
  static constexpr int kBlocks = 2;        // what registers are limited for: with more it spills
  static constexpr int kPitch = kDim + 4;  // a lane per row then meets each bank once

  struct SharedMemoryPlan {
    alignas(16) float q[kRows * kDim];
    float keys[kKeys * kPitch];  // K, then V
    float probs[kRows * kKeys];
    KeyPlan plan;
  };
  static constexpr int kSmemBytes = sizeof(SharedMemoryPlan);
  static_assert(kSmemBytes <= kSmallSmemBytes);
};

}  // namespace ring_attention::cuda::sm80
