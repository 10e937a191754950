// SPDX-License-Identifier: BSD-3-Clause
//
// dK and dV on Hopper. One block of threads owns a tile of keys, 64 to a warpgroup, and one more
// warpgroup loads:
//
//   load K, V (they stay)
//   for each interval, tile of query rows that sees some of the keys, head of the group:
//     start S^T = K Q^T, dP^T = V dO^T
//     P = exp2(S - lse), once S is there;  dS = P (dP - delta);  masked only where it matters
//     dV += P^T dO;  dK += dS^T Q
//   dK, dV are added to the gradients
//
// Where registers hold only one of dK and dV, see keys_in_two_passes(), a launch sums that.
// Products of one warpgroup run beside the exponentials of another.
#pragma once

#include "backward_products.cuh"

namespace ring_attention::cuda::sm90 {

// What a launch sums.
enum class KeysSum { kDk, kDv, kBoth };

template <typename Tile>
struct KeysSmem : Tile::Matrices {
  PassingQueries<Tile::kPassing> passing[Tile::kStages];
};

// K and V of a tile of keys, by all threads; Q and dO of the queries that see it, with what is
// known of each row, by half of the loading warpgroup each.
template <typename Tile>
class KeysLoader {
  static constexpr int kQueries = Tile::kPassing;

 public:
  using Walk = QueryWalk<Tile::kRows>;

  RA_DEVICE KeysLoader(const BackwardCall& call, KeysSmem<Tile>& smem, const KeysTile& tile)
      : call_(call), smem_(smem), tile_(tile) {}

  RA_DEVICE void start_keys() const {
    const KVBlock& block = call_.blocks.block[tile_.block];
    const int k_len = static_cast<int>(block.k_len);
    copy_rows<typename Tile::Kept, Tile::kRows, Tile::kRoles.threads>(
        shared_address(smem_.kept), block.k, block.k_stride, tile_.sample, tile_.kv_head, tile_.key,
        0, k_len, call_.head_dim);
    copy_rows<typename Tile::VKept, Tile::kRows, Tile::kRoles.threads>(
        shared_address(smem_.v_kept), block.v, block.v_stride, tile_.sample, tile_.kv_head,
        tile_.key, 0, k_len, call_.v_head_dim);
    cp_async_commit();
  }

  RA_DEVICE void load_queries(Walk walk, bool more) const {
    typename Tile::Queue queue(smem_.stream, smem_.barriers);
    while (true) {
      queue.wait_until_free();
      auto& passing = smem_.passing[queue.slot()];
      if (more) {
        const int row = walk.tile * kQueries;
        copy_rows<typename Tile::Stream, kQueries, WarpRoles::kLoaders>(
            queue.tile(), call_.q, call_.q_stride, tile_.sample, walk.head, row, 0, call_.q_len,
            call_.head_dim);
        copy_array(passing.lse, call_.row_lse + first_row(walk));
        copy_array(passing.seen, call_.intervals_of(walk.run(call_, tile_), tile_.sample) + row);
        cp_async_commit();
        cp_async_wait<0>();
      }
      if (thread() == 0) passing.last = !more, passing.masked = more && walk.masked();
      queue.publish();
      if (!more) return;
      more = walk.next(call_, tile_);
    }
  }

  RA_DEVICE void load_douts(Walk walk, bool more) const {
    typename Tile::VQueue queue(smem_.v_stream, smem_.v_barriers);
    for (; more; more = walk.next(call_, tile_)) {
      queue.wait_until_free();
      copy_rows<typename Tile::VStream, kQueries, WarpRoles::kLoaders>(
          queue.tile(), call_.dout, call_.dout_stride, tile_.sample, walk.head,
          walk.tile * kQueries, 0, call_.q_len, call_.v_head_dim);
      copy_array(smem_.passing[queue.slot()].minus_delta, call_.minus_delta + first_row(walk));
      cp_async_commit();
      cp_async_wait<0>();
      queue.publish();
    }
  }

 private:
  static RA_DEVICE int thread() { return static_cast<int>(threadIdx.x) % WarpRoles::kLoaders; }
  RA_DEVICE int64_t first_row(const Walk& walk) const {
    return call_.first_row(tile_.sample, walk.head) + walk.tile * kQueries;
  }
  // By copies of 16 bytes, a thread each.
  template <typename T>
  static RA_DEVICE void copy_array(T (&to)[kQueries], const T* from) {
    constexpr int kOfThread = 16 / sizeof(T);
    static_assert(kQueries / kOfThread <= WarpRoles::kLoaders);
    const int at = thread() * kOfThread;
    if (at < kQueries) cp_async_16(shared_address(to + at), from + at, 16);
  }

  const BackwardCall& call_;
  KeysSmem<Tile>& smem_;
  const KeysTile& tile_;
};

// dK and dV of a warpgroup's keys.
template <typename Elem, typename Tile, KeysSum kSum>
class KeysSums {
  static constexpr bool kDk = kSum != KeysSum::kDv, kDv = kSum != KeysSum::kDk;
  static constexpr int kQueries = Tile::kPassing;
  using Passing = PassingQueries<kQueries>;

 public:
  RA_DEVICE KeysSums(const BackwardCall& call, KeysSmem<Tile>& smem, const KeysTile& tile)
      : call_(call), smem_(smem), tile_(tile) {}

  RA_DEVICE void sum() {
    while (true) {
      queries_.wait();
      const Passing& passing = smem_.passing[queries_.slot()];
      if (__any_sync(kAllLanes, passing.last)) break;
      douts_.wait();
      add(passing, __any_sync(kAllLanes, passing.masked));
    }
  }

  // To the gradients, or to this part's own: first all blocks' dK, one after another, then dV.
  RA_DEVICE void write() const {
    const KVBlock& block = call_.blocks.block[tile_.block];
    const int k_len = static_cast<int>(block.k_len);
    const KeysTarget target(call_, tile_);
    if constexpr (kDk) {
      write_sums(dk_, call_.scale, target.dk, tile_.key, k_len, call_.head_dim, target.add);
    }
    if constexpr (kDv) {
      write_sums(dv_, 1.0f, target.dv, tile_.key, k_len, call_.v_head_dim, target.add);
    }
  }

 private:
  RA_DEVICE void add(const Passing& passing, bool masked) {
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
    const float* lse = passing.lse + column;
    const float* minus_delta = passing.minus_delta + column;
    const auto visible = [&](int j, int e, int r) {
      const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
      const int key = tile_.key + warp_row + static_cast<int>(threadIdx.x) % 32 / 4;
      return passing.seen[column + 8 * j + e].has(key + 8 * r);
    };
    Sums<kQueries> s, dp;
    Weights<kQueries> p, ds;
    wgmma_fence();
    start_scores<Elem, typename Tile::Kept, typename Tile::Stream, Tile::kDim, kQueries>(
        s, shared_address(smem_.kept), queries_.tile());
    if constexpr (kDk) {
      start_scores<Elem, typename Tile::VKept, typename Tile::VStream, Tile::kVDim, kQueries>(
          dp, shared_address(smem_.v_kept), douts_.tile());
    }
    wgmma_wait<kDk ? 1 : 0>();
    hold(s);
    exponentiate(s, call_.score.scale, [&](int j, int e, int) { return lse[8 * j + e]; });
    if (masked) mask(s, visible);
    if constexpr (kDk) {
      wgmma_wait<0>();
      hold(dp);
      differentiate(dp, s, [&](int j, int e, int) { return minus_delta[8 * j + e]; });
      if (masked) mask(dp, visible);
      pack<Elem>(dp, ds);
      hold(ds);
    }
    if constexpr (kDv) {
      pack<Elem>(s, p);
      hold(p);
    }
    hold(dv_), hold(dk_);
    wgmma_fence();
    if constexpr (kDv) {
      start_sums<Elem, typename Tile::VStream, Tile::kVDim, kQueries>(dv_, p, douts_.tile());
    }
    if constexpr (kDk) {
      start_sums<Elem, typename Tile::Stream, Tile::kDim, kQueries>(dk_, ds, queries_.tile());
    }
    wgmma_wait<0>();
    hold(dv_), hold(dk_);
    douts_.release();
    queries_.release();
  }

  const BackwardCall& call_;
  KeysSmem<Tile>& smem_;
  const KeysTile& tile_;
  typename Tile::Queue queries_{smem_.stream, smem_.barriers};
  typename Tile::VQueue douts_{smem_.v_stream, smem_.v_barriers};
  Sums<kDk ? Tile::kDim : 8> dk_ = {};
  Sums<kDv ? Tile::kVDim : 8> dv_ = {};
};

template <typename Elem, typename Tile, KeysSum kSum>
__global__ void __launch_bounds__(Tile::kRoles.threads, 1)
    backward_keys(const __grid_constant__ BackwardCall call) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& smem = *reinterpret_cast<KeysSmem<Tile>*>(memory);
  const KeysTile tile(call, Tile::kRows);
  typename KeysLoader<Tile>::Walk walk;
  const bool more = walk.next(call, tile);
  if (!more && call.head_parts * call.row_parts == 1) return;
  const KeysLoader<Tile> loader(call, smem, tile);
  if (more) loader.start_keys();
  smem.init_barriers();
  __syncthreads();
  if (threadIdx.x >= Tile::kRoles.readers) {
    give_up_registers<Tile::kRoles.loader_registers>();
    if (threadIdx.x < Tile::kRoles.readers + WarpRoles::kLoaders) {
      loader.load_queries(walk, more);
    } else {
      loader.load_douts(walk, more);
    }
  } else {
    take_registers<Tile::kRoles.reader_registers>();
    KeysSums<Elem, Tile, kSum> sums(call, smem, tile);
    wait_for_kept_rows<Tile>();
    sums.sum();
    sums.write();
  }
}

}  // namespace ring_attention::cuda::sm90
