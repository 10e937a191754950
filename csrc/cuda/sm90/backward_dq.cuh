// SPDX-License-Identifier: BSD-3-Clause
//
// dQ on Hopper. One block of threads owns a tile of query rows, 64 to a warpgroup, and one more
// warpgroup loads:
//
//   load Q, dO (they stay)
//   for each K/V block, interval, key tile that some row sees:
//     start S = Q K^T, dP = dO V^T
//     P = exp2(S - lse), once S is there;  dS = P (dP - delta);  masked only where it matters
//     dQ += dS K
//   dQ is added to the gradient
//
// Products of one warpgroup run beside the exponentials of another.
#pragma once

#include "backward_products.cuh"

namespace ring_attention::cuda::sm90 {

template <typename Tile>
struct DqSmem : Tile::Matrices {
  PassingKeys passing[Tile::kStages];
};

// Q and dO of a tile of query rows, by all threads; K and V of the keys that it sees, by half of
// the loading warpgroup each, which is handed the walk at its first key tile, if there is one.
template <typename Tile>
class DqLoader {
 public:
  using Walk = KeyWalk<Tile::kRows, Tile::kPassing, Tile::kRangeRows>;

  RA_DEVICE DqLoader(const BackwardCall& call, DqSmem<Tile>& smem, const DqTile& tile)
      : call_(call), smem_(smem), tile_(tile) {}

  RA_DEVICE void start_queries() const {
    copy_rows<typename Tile::Kept, Tile::kRows, Tile::kRoles.threads>(
        shared_address(smem_.kept), call_.q, call_.q_stride, tile_.sample, tile_.head, tile_.row, 0,
        call_.q_len, call_.head_dim);
    copy_rows<typename Tile::VKept, Tile::kRows, Tile::kRoles.threads>(
        shared_address(smem_.v_kept), call_.dout, call_.dout_stride, tile_.sample, tile_.head,
        tile_.row, 0, call_.q_len, call_.v_head_dim);
    cp_async_commit();
  }

  RA_DEVICE void load_keys(Walk walk, bool more) const {
    typename Tile::Queue queue(smem_.stream, smem_.barriers);
    while (true) {
      queue.wait_until_free();
      if (more) {
        const KVBlock& block = call_.blocks.block[walk.block];
        copy_rows<typename Tile::Stream, Tile::kPassing, WarpRoles::kLoaders>(
            queue.tile(), block.k, block.k_stride, tile_.sample, tile_.kv_head, walk.key,
            walk.range.begin, walk.range.end, call_.head_dim);
        cp_async_commit();
        cp_async_wait<0>();
        if (walk.masked(call_)) clear_unseen(walk, queue.tile());
      }
      if (threadIdx.x % WarpRoles::kLoaders == 0) {
        smem_.passing[queue.slot()] = {.last = !more,
                                       .masked = more && walk.masked(call_),
                                       .key = walk.key,
                                       .run = more ? walk.run(call_) : 0};
      }
      queue.publish();
      if (!more) return;
      more = walk.next(call_, tile_);
    }
  }

  RA_DEVICE void load_values(Walk walk, bool more) const {
    typename Tile::VQueue queue(smem_.v_stream, smem_.v_barriers);
    for (; more; more = walk.next(call_, tile_)) {
      const KVBlock& block = call_.blocks.block[walk.block];
      queue.wait_until_free();
      copy_rows<typename Tile::VStream, Tile::kPassing, WarpRoles::kLoaders>(
          queue.tile(), block.v, block.v_stride, tile_.sample, tile_.kv_head, walk.key,
          walk.range.begin, walk.range.end, call_.v_head_dim);
      cp_async_commit();
      cp_async_wait<0>();
      queue.publish();
    }
  }

 private:
  // Zeros in the place of keys that no row sees: what lies there (NaN, perhaps) would be multiplied
  // by dS = 0. A key to a warp, some rows to a lane.
  RA_DEVICE void clear_unseen(const Walk& walk, uint32_t k_tile) const {
    constexpr int kWarps = WarpRoles::kLoaders / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const KeyInterval* rows = call_.intervals_of(walk.run(call_), tile_.sample) + tile_.row;
    KeyInterval seen[Tile::kRows / 32];
#pragma unroll
    for (int i = 0; i < Tile::kRows / 32; ++i) {
      seen[i] = rows[32 * i + lane];
    }
    named_barrier(1, WarpRoles::kLoaders);                           // all keys have arrived
    const int end = min(walk.range.end - walk.key, Tile::kPassing);  // those behind are zeros
    for (int key = threadIdx.x / 32 % kWarps; key < end; key += kWarps) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < Tile::kRows / 32; ++i) any |= seen[i].has(walk.key + key);
      if (!__any_sync(kAllLanes, any)) Tile::Stream::clear(k_tile, key, lane, 32);
    }
  }

  const BackwardCall& call_;
  DqSmem<Tile>& smem_;
  const DqTile& tile_;
};

// dQ of a warpgroup's rows.
template <typename Elem, typename Tile>
class DqSums {
  static constexpr int kKeys = Tile::kPassing;

 public:
  RA_DEVICE DqSums(const BackwardCall& call, DqSmem<Tile>& smem, const DqTile& tile)
      : call_(call), smem_(smem), tile_(tile) {
    const int64_t at = call.first_row(tile.sample, tile.head) + first_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lse_[r] = call.row_lse[at + 8 * r], minus_delta_[r] = call.minus_delta[at + 8 * r];
    }
  }

  RA_DEVICE void sum() {
    keys_.wait();
    while (true) {
      const PassingKeys passing = smem_.passing[keys_.slot()];
      if (__any_sync(kAllLanes, passing.last)) break;
      values_.wait();
      add(passing, __any_sync(kAllLanes, passing.masked));
    }
  }

  RA_DEVICE void write() const {
    const int64_t rows =
        static_cast<int64_t>(tile_.sample * call_.heads + tile_.head) * call_.q_len;
    const int64_t part = tile_.part * call_.batch * call_.heads * call_.q_len;
    const bool add = call_.dq_parts == 1;
    float* to =
        add ? call_.dq + rows * call_.head_dim : call_.partial + (part + rows) * call_.head_dim;
    write_sums(dq_, call_.scale, to, tile_.row, call_.q_len, call_.head_dim, add);
  }

 private:
  RA_DEVICE int first_row() const {
    return tile_.row + static_cast<int>(threadIdx.x) / 32 * 16 +
           static_cast<int>(threadIdx.x) % 32 / 4;
  }

  RA_DEVICE void add(const PassingKeys& passing, bool masked) {
    Sums<kKeys> s, dp;
    wgmma_fence();
    start_scores<Elem, typename Tile::Kept, typename Tile::Stream, Tile::kDim, kKeys>(
        s, shared_address(smem_.kept), keys_.tile());
    start_scores<Elem, typename Tile::VKept, typename Tile::VStream, Tile::kVDim, kKeys>(
        dp, shared_address(smem_.v_kept), values_.tile());
    wgmma_wait<1>();
    hold(s);
    exponentiate(s, call_.score.scale, [&](int, int, int r) { return lse_[r]; });
    // Here, because the compiler moves the wait for dP up, before the exponentials, but not across
    // a loop.
    keys_.wait_for_next();
    wgmma_wait<0>();
    hold(dp);
    values_.release();
    differentiate(dp, s, [&](int, int, int r) { return minus_delta_[r]; });
    if (masked) {
      const KeyInterval* seen = call_.intervals_of(passing.run, tile_.sample) + first_row();
      const KeyInterval rows[2] = {seen[0], seen[8]};
      const int key = passing.key + static_cast<int>(threadIdx.x) % 4 * 2;
      mask(dp, [&](int j, int e, int r) { return rows[r].has(key + 8 * j + e); });
    }
    Weights<kKeys> ds;
    pack<Elem>(dp, ds);
    hold(ds);
    hold(dq_);
    wgmma_fence();
    start_sums<Elem, typename Tile::Stream, Tile::kDim, kKeys>(dq_, ds, keys_.tile());
    wgmma_wait<0>();
    hold(dq_);
    keys_.release();
  }

  const BackwardCall& call_;
  DqSmem<Tile>& smem_;
  const DqTile& tile_;
  typename Tile::Queue keys_{smem_.stream, smem_.barriers};
  typename Tile::VQueue values_{smem_.v_stream, smem_.v_barriers};
  float lse_[2], minus_delta_[2];
  Sums<Tile::kDim> dq_ = {};
};

template <typename Elem, typename Tile>
__global__ void __launch_bounds__(Tile::kRoles.threads, 1)
    backward_dq(const __grid_constant__ BackwardCall call) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& smem = *reinterpret_cast<DqSmem<Tile>*>(memory);
  const DqTile tile(call, Tile::kRows);
  typename DqLoader<Tile>::Walk walk;
  const bool more = walk.next(call, tile);
  if (!more && call.dq_parts == 1) return;
  const DqLoader<Tile> loader(call, smem, tile);
  if (more) loader.start_queries();
  smem.init_barriers();
  __syncthreads();
  if (threadIdx.x >= Tile::kRoles.readers) {
    give_up_registers<Tile::kRoles.loader_registers>();
    if (threadIdx.x < Tile::kRoles.readers + WarpRoles::kLoaders) {
      loader.load_keys(walk, more);
    } else {
      loader.load_values(walk, more);
    }
  } else {
    take_registers<Tile::kRoles.reader_registers>();
    DqSums<Elem, Tile> sums(call, smem, tile);
    wait_for_kept_rows<Tile>();
    sums.sum();
    sums.write();
  }
}

}  // namespace ring_attention::cuda::sm90
