// SPDX-License-Identifier: BSD-3-Clause
//
// The forward kernel for 16-bit inputs on Hopper. One block folds K/V blocks into one tile of query
// rows, as sm80/forward.cuh does, with a warpgroup (four warps) for each 64 rows and one more that
// loads, so that those which multiply meet nowhere:
//
//   plan: which keys the tile sees, as runs; Q is loaded
//   the loaders:  each tile of K and each of V of each run into its queue
//   the readers:  S_0 = Q K_0^T;  P_0 = softmax of it
//                 for each key tile j but the last:
//                   start S_j+1 = Q K_j+1^T
//                   start O += P_j V_j
//                   wait for S_j+1;  scaled, masked;  P_j+1 = 2^(S_j+1 - m);  l += P_j+1
//                   wait for O; it shrinks where m was raised
//                 O += P V of the last one
//   (O, m, l) += the carried state or the sink;  write the state, or out = O / l and lse
//
// Products run beside the softmax: beside that of the same rows, as above, and beside that of other
// warpgroups. Rows: forward_rows.cuh.
//
// Memory: see SharedMemoryPlan. Global memory: none beside the tensors and the parts.
#pragma once

#include "../forward_rows.cuh"
#include "../start.h"
#include "config.h"
#include "forward_launch.h"

namespace ring_attention::cuda::sm90 {

// Q by all threads, K and V by the loading warpgroup. Rows outside a run are zeros.
template <typename Tile>
class Loader {
  static constexpr int kKeys = Tile::kKeys;
  using Smem = typename Tile::SharedMemoryPlan;

 public:
  RA_DEVICE Loader(const ForwardCall& call, Smem& smem, const QueryTile& tile)
      : params_(call.params), smem_(smem), tile_(tile) {}

  RA_DEVICE void start_query() const {
    const auto* q = static_cast<const char*>(params_.q);
    TileCopy<typename Tile::Query, Tile::kThreads>::template run<Tile::kRows>(
        shared_address(smem_.q), static_cast<int>(params_.head_dim), [&](int row) -> const char* {
          return tile_.real(row) ? q + tile_.offset(row, params_.q_stride) * 2 : nullptr;
        });
    cp_async_commit();
  }
  // Before a barrier of all, after which it is there.
  static RA_DEVICE void finish_query() {
    cp_async_wait<0>();
    fence_before_wgmma();
  }

  // The runs of a plan; half of the threads with K, half with V.
  RA_DEVICE void load_keys() {
    load(keys_, [&](const KeyRun& run, int from) {
      TileCopy<typename Tile::Keys, WarpRoles::kLoaders>::template rows<kKeys>(
          keys_.tile(), run.k, run.k_row, from, run.begin, run.end,
          static_cast<int>(params_.head_dim));
      cp_async_commit();
      cp_async_wait<0>();
    });
  }
  RA_DEVICE void load_values() {
    load(values_, [&](const KeyRun& run, int from) {
      TileCopy<typename Tile::Values, WarpRoles::kLoaders>::template rows<kKeys>(
          values_.tile(), run.v, run.v_row, from, run.begin, run.end,
          static_cast<int>(params_.v_head_dim));
      cp_async_commit();
      cp_async_wait<0>();
      if (!run.whole && !run.covers(from, from + kKeys)) clear_unseen(run, from);
    });
  }

 private:
  template <typename Queue, typename Copy>
  RA_DEVICE void load(Queue& queue, const Copy& copy) {
    for (KeyCursor<kKeys> tile(smem_.plan); !tile.done(); tile.next(smem_.plan)) {
      queue.wait_until_free();
      copy(smem_.plan.run(tile.run), tile.from);
      queue.publish();
    }
  }

  // Zeros in the place of keys that no row sees, a few keys to a thread: what lies there (NaN,
  // perhaps) would be multiplied by P = 0. It is rare, and has to make do with few registers.
  RA_DEVICE void clear_unseen(const KeyRun& run, int from) const {
    named_barrier(1, WarpRoles::kLoaders);  // all rows have arrived
    for (int key = threadIdx.x % WarpRoles::kLoaders; key < kKeys; key += WarpRoles::kLoaders) {
      bool seen = false;
#pragma unroll 1
      for (int row = 0; row < Tile::kRows && !seen; ++row) {
        seen = run.of_query(tile_.query(row)).has(from + key);
      }
      if (!seen) Tile::Values::clear(values_.tile(), key);
    }
  }

  const ForwardParams& params_;
  Smem& smem_;
  const QueryTile& tile_;
  typename Tile::KeyQueue keys_{smem_.k, smem_.k_barriers};
  typename Tile::ValueQueue values_{smem_.v, smem_.v_barriers};
};

template <typename Elem, typename Tile>
class Forward : public ForwardRows<Elem, Tile, false> {
  using Rows = ForwardRows<Elem, Tile, false>;
  using Rows::acc_, Rows::kKeys, Rows::kV;
  using typename Rows::Probs, typename Rows::Scores;
  using Smem = typename Tile::SharedMemoryPlan;
  using Cursor = KeyCursor<kKeys>;

 public:
  RA_DEVICE Forward(const ForwardCall& call, Smem& smem, const QueryTile& tile)
      : Rows(call, tile),
        smem_(smem),
        group_row_(__shfl_sync(kAllLanes, threadIdx.x / 128 * 64, 0)),
        working_(tile.real(group_row_)) {}

  // Folds the runs of a plan.
  RA_DEVICE void fold_runs() {
    Cursor tile(smem_.plan);
    if (tile.done()) return;
    if (!working_) return pass(tile);
    Probs probs;
    keys_.wait();
    first_scores(tile, probs);
    while (!tile.done()) step(tile, probs);
    last_values(probs);
  }

 private:
  // A warpgroup without rows lets all tiles go by.
  RA_DEVICE void pass(Cursor& tile) {
    for (; !tile.done(); tile.next(smem_.plan)) {
      keys_.wait();
      keys_.release();
      values_.wait();
      values_.release();
    }
  }

  // P of the first tile, whose K is there. To the next one.
  RA_DEVICE void first_scores(Cursor& tile, Probs& probs) {
    Scores scores;
    float shrink[2];
    const bool full = covered(tile);
    wgmma_fence();
    start_scores(scores);
    wgmma_wait<0>();
    hold(scores[0]);
    keys_.release();
    softmax(scores, tile, full, shrink);
    to_next(tile);
    if (this->any_shrinks(shrink)) this->shrink_band(0, shrink);
    this->pack(0, scores, probs);
  }

  // From P of a tile to that of the next one, `tile`, whose K is there; O += P V of the former.
  RA_DEVICE void step(Cursor& tile, Probs& probs) {
    Scores scores;
    float shrink[2];
    const bool full = covered(tile);
    hold(probs[0]);
    hold(acc_[0]);
    values_.wait();
    wgmma_fence();
    start_scores(scores);
    start_values(probs);
    wgmma_wait<1>();
    hold(scores[0]);
    keys_.release();
    softmax(scores, tile, full, shrink);
    to_next(tile);
    wgmma_wait<0>();
    hold(acc_[0]);
    values_.release();
    if (this->any_shrinks(shrink)) this->shrink_band(0, shrink);
    this->pack(0, scores, probs);
  }

  // To the next tile, and until its K is there. It has its place between the softmax and the wait
  // for O: the compiler moves that wait up, before the softmax, but not across a loop.
  RA_DEVICE void to_next(Cursor& tile) {
    tile.next(smem_.plan);
    if (!tile.done()) keys_.wait();
  }

  RA_DEVICE void last_values(Probs& probs) {
    hold(probs[0]);
    hold(acc_[0]);
    values_.wait();
    wgmma_fence();
    start_values(probs);
    wgmma_wait<0>();
    hold(acc_[0]);
    values_.release();
  }

  // Whether all rows see all keys of a tile, asked before there is something to wait for. The vote
  // tells the compiler that the warp agrees.
  RA_DEVICE bool covered(const Cursor& tile) const {
    return __all_sync(kAllLanes, smem_.plan.run(tile.run).covers(tile.from, tile.from + kKeys));
  }

  // S = Q K^T.
  RA_DEVICE void start_scores(Scores& scores) const {
    using Query = typename Tile::Query;
    using Keys = typename Tile::Keys;
    const uint64_t q = Query::descriptor(shared_address(smem_.q)) + Query::step(group_row_, 0);
    const uint64_t k = Keys::descriptor(keys_.tile());
#pragma unroll
    for (int d = 0; d < Tile::kQk; d += 16) {
      Wgmma<Elem, kKeys>::start_rows(scores[0], q + Query::step(0, d), k + Keys::step(0, d), d > 0);
    }
    wgmma_commit();
  }

  // O += P V.
  RA_DEVICE void start_values(const Probs& probs) {
    using Values = typename Tile::Values;
    const uint64_t v = Values::descriptor(values_.tile());
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      add_columns<Elem, Values, kV>(acc_[0], probs[0][n / 16], v, n);
    }
    wgmma_commit();
  }

  // S becomes P, before it is packed.
  RA_DEVICE void softmax(Scores& scores, const Cursor& tile, bool full, float (&shrink)[2]) {
    this->scale(scores);
    if (!full) this->mask(scores, smem_.plan.run(tile.run), tile.from);
    this->raise_references(0, scores, shrink);
    this->exponentiate(0, scores);
  }

  Smem& smem_;
  const int group_row_;  // this warpgroup's first row; the compiler knows that its warps agree
  const bool working_;   // it has rows
  typename Tile::KeyQueue keys_{smem_.k, smem_.k_barriers};
  typename Tile::ValueQueue values_{smem_.v, smem_.v_barriers};
};

template <typename Elem, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& smem = *reinterpret_cast<typename Tile::SharedMemoryPlan*>(memory);
  const int parts = call.parts.count, block = static_cast<int>(blockIdx.x), part = block % parts;
  const int thread = static_cast<int>(threadIdx.x);
  const QueryTile tile(call.grid, block / parts, Tile::kRows);
  Loader<Tile> loader(call, smem, tile);
  loader.start_query();
  if (thread < Tile::kStages) {
    smem.k_barriers.init(thread, WarpRoles::kLoaders, Tile::kRoles.readers / 32);
    smem.v_barriers.init(thread, WarpRoles::kLoaders, Tile::kRoles.readers / 32);
  }
  // Each plan is made between two barriers of all, by the readers.
  if (thread >= Tile::kRoles.readers) {
    give_up_registers<Tile::kRoles.loader_registers>();
    do {
      __syncthreads();
      Loader<Tile>::finish_query();
      __syncthreads();
      if (thread < Tile::kRoles.readers + WarpRoles::kLoaders) {
        loader.load_keys();
      } else {
        loader.load_values();
      }
    } while (smem.plan.more);
  } else {
    take_registers<Tile::kRoles.reader_registers>();
    Forward<Elem, Tile> forward(call, smem, tile);
    forward.prefetch_carry();
    int first = 0;
    do {
      __syncthreads();
      smem.plan.template make<Tile::kRows, Tile::kKeys>(call.blocks, tile, first, sizeof(Elem),
                                                        call.parts.keys_of(part),
                                                        Tile::kRoles.readers / 32);
      Loader<Tile>::finish_query();
      __syncthreads();
      forward.fold_runs();
      first += kMaxRuns;
    } while (smem.plan.more);
    if (parts > 1) {
      forward.write_part(part);
    } else {
      forward.write();
    }
  }
}

template <typename Elem, typename Dims>
cudaError_t launch_forward(const ForwardCall& call, cudaStream_t stream) {
  using Tile = ForwardTile<Dims::kQk, Dims::kV>;
  return start(forward_kernel<Elem, Tile>, call.grid_size(), Tile::kThreads, Tile::kSmemBytes,
               stream, call);
}

}  // namespace ring_attention::cuda::sm90
