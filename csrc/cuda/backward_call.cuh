// SPDX-License-Identifier: BSD-3-Clause
//
// What a launch of the backward kernels is told, by value.
#pragma once

#include <cuda_runtime_api.h>

#include "../dispatch.h"
#include "key_ranges.cuh"
#include "state.cuh"

namespace ring_attention::cuda {

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

  // Written by the kernels of backward_rows.cuh, read by the others.
  // [batch, heads, padded]. lse in log2 units, in two parts, +inf for a row that saw nothing, so
  // that its P is 0; and what the sums of dP begin with.
  float *row_lse, *row_lse_low, *minus_delta;
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

  RA_DEVICE const RowsRange* ranges_of(int run, int sample) const {
    return ranges + first(run, sample, tiles());
  }
  RA_DEVICE const RowsRange* groups_of(int run, int sample) const {
    return groups + first(run, sample, tile_groups());
  }
  RA_DEVICE const KeyInterval* intervals_of(int run, int sample) const {
    return intervals + first(run, sample, padded);
  }
  // Of a head's rows in the arrays by rows.
  RA_DEVICE int64_t first_row(int sample, int head) const {
    return static_cast<int64_t>(sample * heads + head) * padded;
  }

 private:
  RA_DEVICE int64_t first(int run, int sample, int count) const {
    return static_cast<int64_t>(run * static_cast<int>(batch) + sample) * count;
  }
};

// The sums of parts, into the gradients: see Note [parts].
cudaError_t add_dq_parts(const BackwardCall& call, cudaStream_t stream);
cudaError_t add_keys_parts(const BackwardCall& call, cudaStream_t stream);

}  // namespace ring_attention::cuda
