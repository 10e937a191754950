// SPDX-License-Identifier: BSD-3-Clause
//
// The forward kernel for 16-bit inputs. One block folds K/V blocks into one tile of query rows:
//
//   plan: which keys the tile sees, as runs
//   load Q, and the first tiles of the ring K, V, K, V, ...
//   for each key tile of each run:
//     S = Q K^T;  scaled, capped, masked where the stretch is partial
//     P = 2^(S - m);  l += P;  O shrinks where m was raised
//     O += P V
//   (O, m, l) += the carried state or the sink
//   write the state, or out = O / l and lse
//
// A warp owns rows (forward_rows.cuh); warps meet only where a tile of the ring has arrived, once
// per tile, and by the same barrier the oldest tile is free to be loaded over.
//
// Note [split keys]. Few query rows (decoding, short chunks) are few tiles. Then the keys are cut
// into parts, by shape; each part is a block of its own that writes a state to the workspace, and a
// second kernel joins them, in order, with the carried state.
//
// Note [waits]. A scheduler has two warps here (few rows: fewer), and while one waits for a read of
// shared memory the other may have to wait too: on an H100 a sixth of a profile's samples (head dim
// 128) stood at comparisons with numbers of the plan. So the cursor keeps the end of its run in a
// register, and whether the next tile needs masks is asked before O += P V, whose products cover
// the read.
//
// Memory: see SharedMemoryPlan. Global memory: none beside the tensors and the parts.
#pragma once

#include "../forward_rows.cuh"
#include "../start.h"
#include "config.h"
#include "forward_launch.h"

namespace ring_attention::cuda::sm80 {

template <typename Elem, typename Tile, bool kSoftcap>
class Forward : public ForwardRows<Elem, Tile, kSoftcap> {
  using Rows = ForwardRows<Elem, Tile, kSoftcap>;
  using Rows::kBands, Rows::kKeys, Rows::kV, Rows::call_, Rows::tile_, Rows::warp_row_, Rows::acc_;
  using typename Rows::Probs, typename Rows::Scores;
  using Smem = typename Tile::SharedMemoryPlan;
  static constexpr int kQk = Tile::kQk;

 public:
  RA_DEVICE Forward(const ForwardCall& call, Smem& smem, const QueryTile& tile, KeyPart part)
      : Rows(call, tile), smem_(smem), part_(part), working_(tile.real(warp_row_)) {}

  RA_DEVICE void load_query() const {
    const ForwardParams& p = call_.params;
    const auto* q = static_cast<const char*>(p.q);
    TileCopy<TileLayout<kQk>, Tile::kThreads>::template run<Tile::kRows>(
        shared_address(smem_.q), static_cast<int>(p.head_dim), [&](int row) -> const char* {
          if (!tile_.real(row)) return nullptr;
          return q + tile_.offset(row, p.q_stride) * int64_t{sizeof(Elem)};
        });
  }

  // Folds the runs from `first` on; returns whether there are more than were planned.
  RA_DEVICE bool fold_runs(int first) {
    __syncthreads();  // the last plan and the ring are not read any more
    smem_.plan.template make<Tile::kRows, kKeys>(call_.blocks, tile_, first, sizeof(Elem), part_,
                                                 Tile::kThreads / 32);
    __syncthreads();
    KeyCursor<kKeys> tile(smem_.plan), ahead(smem_.plan);
    slot_ = 0;
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (i % 2 == 0) {
        load_k(ahead, i);
      } else {
        load_v(ahead, i);
      }
    }
    bool full = covered(tile);
    while (!tile.done()) {
      const KeyRun& run = smem_.plan.run(tile.run);
      const uint32_t k_tile = next_tile<kLastIsK>(ahead);
      Scores scores;
      Probs probs;
      if (working_) {
        multiply_keys(scores, k_tile);
        this->scale(scores);
        if (!full) this->mask(scores, run, tile.from);
        softmax_update(scores, probs);
      }
      const uint32_t v_tile = next_tile<!kLastIsK>(ahead);
      if (!full && !run.whole) {
        clear_unseen<Tile::kRows, kKeys, kV>(v_tile, run, tile_, tile.from);
        __syncthreads();
      }
      tile.next(smem_.plan);
      full = covered(tile);
      if (working_) accumulate(probs, v_tile);
    }
    cp_async_wait<0>();  // Q, where no key was seen
    return smem_.plan.more;
  }

 private:
  // Whether all rows see all keys of a tile; asked ahead, see Note [waits].
  RA_DEVICE bool covered(const KeyCursor<kKeys>& tile) const {
    return !tile.done() && smem_.plan.run(tile.run).covers(tile.from, tile.from + kKeys);
  }

  // ---- The ring. Step u takes tile u, and loads tile u + kStages - 1 over tile u - 1.

  // Tiles of the ring are K, V, K, V, ...: whether those that K steps load are K too.
  static constexpr bool kLastIsK = Tile::kStages % 2 == 1;

  // The tile after those on their way, into a slot; an empty group where there is none.
  RA_DEVICE void load_k(const KeyCursor<kKeys>& ahead, int slot) {
    if (!ahead.done()) {
      const KeyRun& run = smem_.plan.run(ahead.run);
      TileCopy<TileLayout<kQk>, Tile::kThreads>::template rows<kKeys>(
          shared_address(smem_.ring[slot]), run.k, run.k_row, ahead.from, run.begin, run.end,
          static_cast<int>(call_.params.head_dim));
    }
    cp_async_commit();
  }
  RA_DEVICE void load_v(KeyCursor<kKeys>& ahead, int slot) {
    if (!ahead.done()) {
      const KeyRun& run = smem_.plan.run(ahead.run);
      TileCopy<TileLayout<kV>, Tile::kThreads>::template rows<kKeys>(
          shared_address(smem_.ring[slot]), run.v, run.v_row, ahead.from, run.begin, run.end,
          static_cast<int>(call_.params.v_head_dim));
      ahead.next(smem_.plan);
    }
    cp_async_commit();
  }

  // Waits for the next tile of the ring and returns it; the one before it is free from here on.
  template <bool kLoadK>
  RA_DEVICE uint32_t next_tile(KeyCursor<kKeys>& ahead) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    const int free = slot_ == 0 ? Tile::kStages - 1 : slot_ - 1;
    if constexpr (kLoadK) {
      load_k(ahead, free);
    } else {
      load_v(ahead, free);
    }
    const uint32_t tile = shared_address(smem_.ring[slot_]);
    slot_ = slot_ + 1 == Tile::kStages ? 0 : slot_ + 1;
    return tile;
  }

  // ---- One key tile.

  // S = Q K^T.
  RA_DEVICE void multiply_keys(Scores& scores, uint32_t k_tile) const {
    const RowOperand<kQk> q(shared_address(smem_.q), warp_row_);
    const TransposedOperand<kQk> k(k_tile);
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        scores[b][n][0] = scores[b][n][1] = scores[b][n][2] = scores[b][n][3] = 0.0f;
      }
    }
#pragma unroll
    for (int d = 0; d < kQk; d += 16) {
      uint32_t rows[kBands][4];
#pragma unroll
      for (int b = 0; b < kBands; ++b) q.load(rows[b], b * 16, d);
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        uint32_t keys[4];
        k.load(keys, n, d);
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
          Elem::mma(scores[b][n / 8], rows[b], keys[0], keys[1]);
          Elem::mma(scores[b][n / 8 + 1], rows[b], keys[2], keys[3]);
        }
      }
    }
  }

  RA_DEVICE void softmax_update(Scores& scores, Probs& probs) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      float shrink[2];
      this->raise_references(b, scores, shrink);
      if (this->any_shrinks(shrink)) this->shrink_band(b, shrink);
      this->exponentiate(b, scores);
      this->pack(b, scores, probs);
    }
  }

  // O += P V.
  RA_DEVICE void accumulate(const Probs& probs, uint32_t v_tile) {
    const ColumnOperand<kV> v(v_tile);
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
#pragma unroll
      for (int d = 0; d < kV; d += 16) {
        uint32_t columns[4];
        v.load(columns, n, d);
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
          Elem::mma(acc_[b][d / 8], probs[b][n / 16], columns[0], columns[1]);
          Elem::mma(acc_[b][d / 8 + 1], probs[b][n / 16], columns[2], columns[3]);
        }
      }
    }
  }

  Smem& smem_;
  const KeyPart part_;
  const bool working_;  // this warp has rows

  int slot_ = 0;  // of the ring, the next to be taken
};

template <typename Elem, typename Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& smem = *reinterpret_cast<typename Tile::SharedMemoryPlan*>(memory);
  const int parts = call.parts.count, block = static_cast<int>(blockIdx.x);
  const int part = block % parts;
  const QueryTile tile(call.grid, block / parts, Tile::kRows);
  Forward<Elem, Tile, kSoftcap> forward(call, smem, tile, call.parts.keys_of(part));
  forward.load_query();
  forward.prefetch_carry();
  for (int first = 0; forward.fold_runs(first); first += kMaxRuns) {
  }
  if (parts > 1) {
    forward.write_part(part);
  } else {
    forward.write();
  }
}

template <typename Elem, typename Dims>
cudaError_t launch_forward(const ForwardCall& call, TileFor use, cudaStream_t stream) {
  const auto with = [&]<TileFor kUse, bool kSoftcap>() {
    using Tile = typename ForwardTileFor<Dims, kUse>::Tile;
    return start(forward_kernel<Elem, Tile, kSoftcap>, call.grid_size(), Tile::kThreads,
                 Tile::kSmemBytes, stream, call);
  };
  const bool softcap = call.params.softcap != 0.0;
  switch (use) {
    case TileFor::kFewRows:
      return softcap ? with.template operator()<TileFor::kFewRows, true>()
                     : with.template operator()<TileFor::kFewRows, false>();
    case TileFor::kLargeSmem:  // see tile_for()
      return softcap ? cudaErrorNotSupported
                     : with.template operator()<TileFor::kLargeSmem, false>();
    default:
      return softcap ? with.template operator()<TileFor::kSmallSmem, true>()
                     : with.template operator()<TileFor::kSmallSmem, false>();
  }
}

}  // namespace ring_attention::cuda::sm80
