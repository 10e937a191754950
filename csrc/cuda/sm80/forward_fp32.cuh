// SPDX-License-Identifier: BSD-3-Clause
//
// The forward kernel for fp32 inputs, the same steps as forward.cuh with fused multiply-adds
// instead of tensor cores and plain copies instead of a pipeline: right first, a few percent of the
// 16-bit kernels' speed.
//
//   plan: which keys the tile sees, as runs
//   load Q
//   for each key tile of each run:
//     load K;  S = Q K^T, a key to a lane;  scaled, capped, masked
//     P = 2^(S - m);  l += P;  O shrinks where m was raised
//     load V over K;  O += P V, a column to a lane
//   (O, m, l) += the carried state or the sink
//   write the state, or out = O / l and lse
//
// Sums are taken by key tile and added to O, products over the head dim four at a time: errors do
// not grow with the sequence. Memory: see Fp32Tile.
#pragma once

#include "../start.h"
#include "config.h"
#include "forward_launch.h"
#include "products_fp32.cuh"

namespace ring_attention::cuda::sm80 {

template <typename Tile, bool kSoftcap>
class ForwardFp32 {
  static constexpr int kRows = Tile::kWarpRows, kKeys = Tile::kKeys, kPitch = Tile::kPitch;
  static constexpr int kColumns = Tile::kDim / 32;  // of a lane: lane, lane + 32, ...
  using Smem = typename Tile::SharedMemoryPlan;

 public:
  RA_DEVICE ForwardFp32(const ForwardCall& call, Smem& smem, const QueryTile& tile, KeyPart part)
      : call_(call),
        smem_(smem),
        tile_(tile),
        part_(part),
        warp_row_(threadIdx.x / 32 * kRows),
        lane_(threadIdx.x % 32) {}

  RA_DEVICE void load_query() const {
    const ForwardParams& p = call_.params;
    for (int r = warp_row_; r < warp_row_ + kRows; ++r) {
      const float* q = static_cast<const float*>(p.q) + tile_.offset(r, p.q_stride);
      for (int d = lane_; d < p.head_dim; d += 32) {
        smem_.q[r * Tile::kDim + d] = tile_.real(r) ? q[d] : 0.0f;
      }
    }
  }

  // Folds the runs from `first` on; returns whether there are more than were planned.
  RA_DEVICE bool fold_runs(int first) {
    __syncthreads();
    smem_.plan.template make<Tile::kRows, kKeys>(call_.blocks, tile_, first, sizeof(float), part_,
                                                 Tile::kThreads / 32);
    __syncthreads();
    for (KeyCursor<kKeys> tile(smem_.plan); !tile.done(); tile.next(smem_.plan)) {
      const KeyRun& run = smem_.plan.run(tile.run);
      const bool full = run.covers(tile.from, tile.from + kKeys);
      load_keys(run.k, run.k_row, run, tile.from, call_.params.head_dim);
      __syncthreads();
      float scores[kRows];
      multiply_keys(scores);
      if (!full) mask(scores, run, tile.from);
      softmax_update(scores);
      __syncthreads();
      load_keys(run.v, run.v_row, run, tile.from, call_.params.v_head_dim);
      __syncthreads();
      if (!full && !run.whole) {
        clear_unseen_values(run, tile.from);
        __syncthreads();
      }
      accumulate();
      __syncthreads();
    }
    return smem_.plan.more;
  }

  // The state as a part of the whole call.
  RA_DEVICE void write_part(int part) {
    const ForwardParams& p = call_.params;
    const int64_t first = part * p.batch * p.heads * p.q_len;
    for_rows([&](int row, const RowState& state, const float (&acc)[kColumns]) {
      const int64_t at = first + flat(row);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane_ + 32 * c;
        if (d < p.v_head_dim) call_.parts.acc[at * p.v_head_dim + d] = acc[c];
      }
      if (lane_ == 0) call_.parts.m[at] = state.m, call_.parts.l[at] = state.l;
    });
  }

  // The carried state or the sink is added; the state is written, or the output.
  RA_DEVICE void write() {
    const ForwardParams& p = call_.params;
    for_rows([&](int row, const RowState& state, const float (&acc)[kColumns]) {
      const int64_t at = flat(row);
      const Join join(initial_state(p, at, tile_.head(row)), state);
      __syncwarp();  // before lane 0 writes what all lanes read
      const RowState& joined = join.joined;
      const bool carries = !p.first && join.ours != 0.0f;
      float* carried = static_cast<float*>(p.acc) + at * p.v_head_dim;
      float* out = static_cast<float*>(p.out) + (p.last ? tile_.offset(row, p.out_stride) : 0);
      const float normalizer = joined.normalizer();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane_ + 32 * c;
        if (d >= p.v_head_dim) break;
        float sum = join.theirs * acc[c];
        if (carries) sum = fmaf(join.ours, carried[d], sum);
        if (!p.last) {
          carried[d] = sum;
        } else {
          out[d] = joined.l != 0.0f ? sum * normalizer : 0.0f;
        }
      }
      if (lane_ != 0) return;
      if (p.last) {
        static_cast<float*>(p.lse)[at] = joined.lse();
      } else {
        static_cast<float*>(p.m)[at] = joined.m, static_cast<float*>(p.l)[at] = joined.l;
      }
    });
  }

 private:
  RA_DEVICE int64_t flat(int row) const {
    return tile_.flat(row, static_cast<int>(call_.params.heads));
  }

  // Rows of K or V, zeros outside of the run and up to the columns that accumulate() takes at once.
  RA_DEVICE void load_keys(const char* data, int64_t stride, const KeyRun& run, int from,
                           int64_t dim) const {
    for (int r = threadIdx.x / 32; r < kKeys; r += Tile::kWarps) {
      const int key = from + r;
      const bool there = run.begin <= key && key < run.end;
      const auto* row = reinterpret_cast<const float*>(data + key * stride);
      for (int d = lane_; d < round_up(dim, 64); d += 32) {
        smem_.keys[r * kPitch + d] = there && d < dim ? row[d] : 0.0f;
      }
    }
  }

  RA_DEVICE void clear_unseen_values(const KeyRun& run, int from) const {
    for_unseen_keys<Tile::kRows, kKeys>(run, tile_, from, [&](int key) {
      for (int d = lane_; d < call_.params.v_head_dim; d += 32) smem_.keys[key * kPitch + d] = 0.0f;
    });
  }

  // S = Q K^T in log2 units, of this warp's rows and this lane's key.
  RA_DEVICE void multiply_keys(float (&scores)[kRows]) const {
    float sums[kRows] = {};
    const float* q = smem_.q + warp_row_ * Tile::kDim;
    for (int d = 0; d < call_.params.head_dim; d += 4) {
      const float4 k = *reinterpret_cast<const float4*>(smem_.keys + lane_ * kPitch + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 x = *reinterpret_cast<const float4*>(q + r * Tile::kDim + d);
        sums[r] = multiply_add(x, k, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) scores[r] = call_.scale.apply<kSoftcap>(sums[r]);
  }

  // -inf where a row does not see a key. A select: what an unseen key gives may be NaN.
  RA_DEVICE void mask(float (&scores)[kRows], const KeyRun& run, int from) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const KeyInterval seen = run.of_query(tile_.query(warp_row_ + r));
      scores[r] = seen.has(from + lane_) ? scores[r] : -kInfinity;
    }
  }

  // P = 2^(S - m), and l += P. See Note [lazy reference].
  RA_DEVICE void softmax_update(const float (&scores)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float most = scores[r];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
      }
      const float shrink = state_[r].raise(most, Float32::kLazyMax);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) acc_[r][c] *= shrink;
      const float prob = exp2_approx(scores[r] - state_[r].reference());
      state_[r].l += prob;
      smem_.probs[(warp_row_ + r) * kKeys + lane_] = prob;
    }
  }

  // O += P V.
  RA_DEVICE void accumulate() {
    const float* probs = smem_.probs + warp_row_ * kKeys;
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      if (32 * c >= call_.params.v_head_dim) break;
      float sums[kRows][2] = {};
#pragma unroll 2
      for (int j = 0; j < kKeys; j += 4) {
        float v[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i][0] = smem_.keys[(j + i) * kPitch + lane_ + 32 * c];
          v[i][1] = smem_.keys[(j + i) * kPitch + lane_ + 32 * (c + 1)];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 p = *reinterpret_cast<const float4*>(probs + r * kKeys + j);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sums[r][i] = fmaf(p.x, v[0][i], sums[r][i]),
            sums[r][i] = fmaf(p.y, v[1][i], sums[r][i]);
            sums[r][i] = fmaf(p.z, v[2][i], sums[r][i]),
            sums[r][i] = fmaf(p.w, v[3][i], sums[r][i]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) acc_[r][c] += sums[r][0], acc_[r][c + 1] += sums[r][1];
    }
  }

  // Calls visit(row, state, acc) for this warp's real rows, with l summed over all keys.
  template <typename Visit>
  RA_DEVICE void for_rows(const Visit& visit) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      RowState state = state_[r];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        state.l += __shfl_xor_sync(kAllLanes, state.l, lanes);
      }
      if (tile_.real(warp_row_ + r)) visit(warp_row_ + r, state, acc_[r]);
    }
  }

  const ForwardCall& call_;
  Smem& smem_;
  const QueryTile tile_;
  const KeyPart part_;
  const int warp_row_, lane_;

  float acc_[kRows][kColumns] = {};
  RowState state_[kRows];  // m of the row, l of this lane's keys
};

template <typename Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    forward_fp32_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& smem = *reinterpret_cast<typename Tile::SharedMemoryPlan*>(memory);
  const int parts = call.parts.count, block = static_cast<int>(blockIdx.x);
  const int part = block % parts;
  const QueryTile tile(call.grid, block / parts, Tile::kRows);
  ForwardFp32<Tile, kSoftcap> forward(call, smem, tile, call.parts.keys_of(part));
  forward.load_query();
  for (int first = 0; forward.fold_runs(first); first += kMaxRuns) {
  }
  if (parts > 1) {
    forward.write_part(part);
  } else {
    forward.write();
  }
}

template <int kMaxDim>
cudaError_t launch_forward_fp32(const ForwardCall& call, cudaStream_t stream) {
  return visit_flag(call.params.softcap != 0.0, [&]<typename Softcap>(Softcap) {
    using Tile = Fp32Tile<kMaxDim>;
    return start(forward_fp32_kernel<Tile, Softcap::value>, call.grid_size(), Tile::kThreads,
                 Tile::kSmemBytes, stream, call);
  });
}

}  // namespace ring_attention::cuda::sm80
