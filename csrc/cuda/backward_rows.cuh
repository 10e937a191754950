// SPDX-License-Identifier: BSD-3-Clause
//
// What the backward kernels want to know of each query row, written once per launch in the form
// they read it in, and the sums of parts. Bound by memory: a thread or a warp per row or tile.
#pragma once

#include "backward_call.cuh"

namespace ring_attention::cuda {

constexpr int kRowThreads = 256;
constexpr int kGroupThreads = 32 * 32;

// row_lse, row_lse_low, minus_delta. lse is scaled to log2 units in double, for two floats hold it.
__global__ void __launch_bounds__(kRowThreads)
    row_stats(const __grid_constant__ BackwardCall call) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (index >= call.batch * call.heads * call.padded) return;
  const int row = static_cast<int>(index % call.padded);
  float lse = kInfinity, lse_low = 0.0f, delta = 0.0f;
  if (row < call.q_len) {
    const int64_t at = index / call.padded * call.q_len + row;
    if (call.lse[at] != -kInfinity) {
      const double log2 = call.lse[at] * 1.44269504088896340736;
      lse = static_cast<float>(log2);
      lse_low = isinf(lse) ? 0.0f : static_cast<float>(log2 - lse);
      delta = call.delta[at];
    }
  }
  call.row_lse[index] = lse;
  call.row_lse_low[index] = lse_low;
  call.minus_delta[index] = -delta;
}

// Of all lanes' rows.
RA_DEVICE RowsRange united(const RowsRange& range) {
  return {__reduce_min_sync(kAllLanes, range.begin), __reduce_max_sync(kAllLanes, range.end),
          __reduce_max_sync(kAllLanes, range.full_begin),
          __reduce_min_sync(kAllLanes, range.full_end)};
}

// intervals[runs, batch, padded], ranges and groups: a warp per tile, a block of threads per group.
// Rows beyond the last one see nothing, and make no tile partial.
__global__ void __launch_bounds__(kGroupThreads)
    key_ranges(const __grid_constant__ BackwardCall call) {
  __shared__ int tile_begin[32], tile_end[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile = static_cast<int>(blockIdx.x % call.tile_groups()) * 32 + warp;
  const int64_t rest = blockIdx.x / call.tile_groups(), sample = rest % call.batch;
  const int run = static_cast<int>(rest / call.batch);
  int block = 0;
  while (run >= call.first_run[block + 1]) ++block;
  const KVBlock& b = call.blocks.block[block];
  const int interval = run - call.first_run[block];
  const int32_t* begins =
      b.key_begin + sample * b.begin_stride.batch + interval * b.begin_stride.head;
  const int32_t* ends = b.key_end + sample * b.end_stride.batch + interval * b.end_stride.head;
  const int64_t at = (run * call.batch + sample) * call.tiles() + tile;
  RowsRange range{INT_MAX, 0, 0, INT_MAX};
  if (tile < call.tiles()) {
#pragma unroll 1
    for (int i = lane; i < call.stream; i += 32) {  // twice at most
      const int64_t row = static_cast<int64_t>(tile) * call.stream + i;
      KeyInterval seen{INT_MAX, 0};
      if (row < call.q_len) {
        const int begin = max(begins[row * b.begin_stride.row], 0);
        const int end =
            static_cast<int>(min(static_cast<int64_t>(ends[row * b.end_stride.row]), b.k_len));
        if (begin < end) seen = {begin, end};
        range.add({seen.begin, seen.end, seen.begin, seen.end});
      }
      call.intervals[at * call.stream + i] = seen;
    }
    range = united(range);
    if (lane == 0) call.ranges[at] = range;
  }
  if (lane == 0) tile_begin[warp] = range.begin, tile_end[warp] = range.end;
  __syncthreads();
  if (warp != 0) return;
  // Nobody asks whether all rows of a group see a key.
  const int begin = __reduce_min_sync(kAllLanes, tile_begin[lane]);
  const int end = __reduce_max_sync(kAllLanes, tile_end[lane]);
  if (lane == 0) call.groups[blockIdx.x] = {begin, end, INT_MAX, 0};
}

// to[i] += partial[0][i] + partial[1][i] + ..., see Note [parts].
__global__ void __launch_bounds__(kRowThreads)
    add_parts(float* to, const float* partial, int parts, int64_t stride, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= count) return;
  float sum = partial[i];
  for (int part = 1; part < parts; ++part) sum += partial[part * stride + i];
  to[i] += sum;
}

}  // namespace ring_attention::cuda
