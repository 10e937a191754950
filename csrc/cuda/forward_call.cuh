// SPDX-License-Identifier: BSD-3-Clause
//
// One launch of a forward kernel: what it is told, by value, and how its blocks of threads are cut.
#pragma once

#include <cuda_runtime_api.h>

#include "../dispatch.h"
#include "key_ranges.cuh"
#include "state.cuh"

namespace ring_attention::cuda {

// What a launch is cut into.
struct TileSize {
  int rows, keys;
  int blocks;  // on a multiprocessor
};

// Note [split keys]: where query tiles are few, the keys of a launch are cut into parts, by shape,
// and each tile is as many blocks of threads. Each writes a state; join_parts() joins them.
struct ForwardParts {
  int count = 1;
  int64_t keys = 0;  // of a part, a multiple of the key tile; counted over all blocks
  // States of the parts, [count] of each; null where there is one part.
  float* acc = nullptr;
  float* m = nullptr;
  float* l = nullptr;

  static constexpr int64_t kMultiprocessors = 132;  // of large devices: those of an H100
  static constexpr int64_t kLeastKeys = 256;        // to make up for a state written and read again

  static ForwardParts of(const KVBlocks& blocks, int64_t tiles, const TileSize& tile) {
    int64_t keys = 0;
    for (int i = 0; i < blocks.count; ++i) keys += round_up(blocks.block[i].k_len, tile.keys);
    const int64_t blocks_wanted = kMultiprocessors * std::max(tile.blocks, 2);
    const int64_t wanted = std::max<int64_t>(blocks_wanted / std::max<int64_t>(tiles, 1), 1);
    const int64_t parts = std::clamp<int64_t>(keys / kLeastKeys, 1, wanted);
    ForwardParts result;
    result.keys = round_up(divide_up(keys, parts), tile.keys);
    // Rounding up may leave nothing for the last ones.
    if (keys > 0) result.count = static_cast<int>(divide_up(keys, result.keys));
    return result;
  }

  static int64_t state_bytes(const ForwardParams& p) {
    return p.batch * p.heads * p.q_len * (p.v_head_dim + 2) * int64_t{sizeof(float)};
  }
  int64_t workspace_bytes(const ForwardParams& p) const {
    return count > 1 ? count * state_bytes(p) : 0;
  }
  void place(void* workspace, const ForwardParams& p) {
    const int64_t rows = count * p.batch * p.heads * p.q_len;
    acc = static_cast<float*>(workspace);
    m = acc + rows * p.v_head_dim;
    l = m + rows;
  }

  RA_DEVICE KeyPart keys_of(int part) const {
    if (count == 1) return {0, LLONG_MAX / 2};
    return {part * keys, (part + 1) * keys};
  }
};

struct ForwardCall {
  ForwardParams params;
  KVBlocks blocks;
  QueryGrid grid;
  ScoreScale scale;
  ForwardParts parts;

  // The blocks [first_block, first_block + kMaxBlocks) of a call, in tiles of this size.
  static ForwardCall of(const ForwardParams& p, int64_t first_block, const TileSize& tile) {
    ForwardCall call{.params = p,
                     .blocks = KVBlocks::of(p, first_block),
                     .grid = QueryGrid::of(p, tile.rows),
                     .scale = ScoreScale::of(p.scale, p.softcap),
                     .parts = {}};
    call.parts = ForwardParts::of(call.blocks, call.grid.count(p.batch), tile);
    return call;
  }
  int64_t grid_size() const { return grid.count(params.batch) * parts.count; }
};

// What a row has before a call folds anything: `row` counts over [batch, heads, q_len].
RA_DEVICE RowState initial_state(const ForwardParams& p, int64_t row, int head) {
  if (p.first) {
    return p.sinks == nullptr ? RowState{}
                              : RowState::of_sink(static_cast<const float*>(p.sinks)[head]);
  }
  return {static_cast<const float*>(p.m)[row], static_cast<const float*>(p.l)[row]};
}

// The parts of a launch, in order, and the carried state, into the state or the output.
cudaError_t join_parts(const ForwardCall& call, cudaStream_t stream);

}  // namespace ring_attention::cuda
