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
// A warp owns rows of Q and all of their S, P and O, in registers; warps meet only where a tile of
// the ring has arrived, once per tile, and by the same barrier the oldest tile is free to be loaded
// over. O starts from zero and the carried state is added last, so that its way from memory (begun
// as a prefetch) is hidden. Scores and states: state.cuh. A row's result depends on its own
// interval only: key tiles lie on a fixed grid, and what a row does not see adds exact zeros.
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

#include "../start.h"
#include "config.h"
#include "forward_launch.h"

namespace ring_attention::cuda::sm80 {

template <typename Elem, typename Tile, bool kSoftcap>
class Forward {
  static constexpr int kBands = Tile::kWarpRows / 16;  // of 16 rows: fragments of one row operand
  static constexpr int kKeys = Tile::kKeys, kQk = Tile::kQk, kV = Tile::kV;
  using Smem = typename Tile::SharedMemoryPlan;

 public:
  RA_DEVICE Forward(const ForwardCall& call, Smem& smem, const QueryTile& tile, KeyPart part)
      : call_(call),
        smem_(smem),
        tile_(tile),
        part_(part),
        warp_row_(threadIdx.x / 32 * Tile::kWarpRows),
        working_(tile.real(warp_row_)) {}

  RA_DEVICE void load_query() const {
    const ForwardParams& p = call_.params;
    const auto* q = static_cast<const char*>(p.q);
    TileCopy<kQk, Tile::kThreads>::template run<Tile::kRows>(
        shared_address(smem_.q), static_cast<int>(p.head_dim), [&](int row) -> const char* {
          if (!tile_.real(row)) return nullptr;
          return q + tile_.offset(row, p.q_stride) * int64_t{sizeof(Elem)};
        });
  }

  // What the epilogue will read.
  RA_DEVICE void prefetch_carry() const {
    const ForwardParams& p = call_.params;
    if (p.first || call_.parts.count > 1) return;
    for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
      if (!tile_.real(row)) return;
      const float* acc = carried(p.acc) + flat(row) * p.v_head_dim;
      for (int d = 0; d < p.v_head_dim; d += 32) prefetch_l2(acc + d);
    }
  }

  // Folds the runs from `first` on; returns whether there are more than were planned.
  RA_DEVICE bool fold_runs(int first) {
    __syncthreads();  // the last plan and the ring are not read any more
    smem_.plan.template make<Tile::kRows, kKeys>(call_.blocks, tile_, first, sizeof(Elem), part_);
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
      float scores[kBands][kKeys / 8][4];
      uint32_t probs[kBands][kKeys / 16][4];
      if (working_) {
        multiply_keys(scores, k_tile);
        scale(scores);
        if (!full) mask(scores, run, tile.from);
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

  // The state as a part of the whole call.
  RA_DEVICE void write_part(int part) {
    const ForwardParts& parts = call_.parts;
    const ForwardParams& p = call_.params;
    const int64_t first = part * p.batch * p.heads * p.q_len;
    for_rows([&](int, int, int row, const RowState& state, auto&& each_pair) {
      const int64_t at = first + flat(row);
      float* acc = parts.acc + at * p.v_head_dim;
      each_pair([&](int d, float low, float high) { store(acc + d, low, high); });
      if (threadIdx.x % 4 == 0) parts.m[at] = state.m, parts.l[at] = state.l;
    });
  }

  // The carried state or the sink is added; the state is written, or the output.
  RA_DEVICE void write() {
    const ForwardParams& p = call_.params;
    RowState before[kBands][2];
    for_bands([&](int b, int half, int row) {
      before[b][half] = initial_state(p, flat(row), tile_.head(row));
    });
    __syncwarp();  // before a lane writes what its neighbours read
    for_rows([&](int b, int half, int row, const RowState& state, auto&& each_pair) {
      const int64_t at = flat(row);
      const Join join(before[b][half], state);
      const RowState& joined = join.joined;
      const bool carries = !p.first && join.ours != 0.0f;
      float* acc = carried(p.acc) + at * p.v_head_dim;
      const float normalizer = joined.normalizer();
      Elem* out = static_cast<Elem*>(p.out) + (p.last ? tile_.offset(row, p.out_stride) : 0);
      const bool by_pairs = reinterpret_cast<uintptr_t>(out) % 4 == 0;  // rows may begin anywhere
      each_pair([&](int d, float low, float high) {
        low *= join.theirs, high *= join.theirs;
        if (carries) {
          const float2 before = *reinterpret_cast<const float2*>(acc + d);
          low = fmaf(join.ours, before.x, low), high = fmaf(join.ours, before.y, high);
        }
        if (!p.last) {
          store(acc + d, low, high);
        } else {
          const bool seen = joined.l != 0.0f;
          const uint32_t pair =
              Elem::pack(seen ? low * normalizer : 0.0f, seen ? high * normalizer : 0.0f);
          if (by_pairs) {
            *reinterpret_cast<uint32_t*>(out + d) = pair;
          } else {
            out[d].bits = static_cast<uint16_t>(pair);
            out[d + 1].bits = static_cast<uint16_t>(pair >> 16);
          }
        }
      });
      if (threadIdx.x % 4 != 0) return;
      if (p.last) {
        carried(p.lse)[at] = joined.lse();
      } else {
        carried(p.m)[at] = joined.m, carried(p.l)[at] = joined.l;
      }
    });
  }

 private:
  static RA_DEVICE float* carried(void* data) { return static_cast<float*>(data); }
  static RA_DEVICE void store(float* to, float low, float high) {
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
  }
  RA_DEVICE int64_t flat(int row) const {
    return tile_.flat(row, static_cast<int>(call_.params.heads));
  }

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
      TileCopy<kQk, Tile::kThreads>::template rows<kKeys>(shared_address(smem_.ring[slot]), run.k,
                                                          run.k_row, ahead.from, run.begin, run.end,
                                                          static_cast<int>(call_.params.head_dim));
    }
    cp_async_commit();
  }
  RA_DEVICE void load_v(KeyCursor<kKeys>& ahead, int slot) {
    if (!ahead.done()) {
      const KeyRun& run = smem_.plan.run(ahead.run);
      TileCopy<kV, Tile::kThreads>::template rows<kKeys>(shared_address(smem_.ring[slot]), run.v,
                                                         run.v_row, ahead.from, run.begin, run.end,
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

  // ---- One key tile. Fragment element e of key column n: key 8 n + 2 (lane mod 4) + e mod 2 of
  // row 8 (e / 2) + lane / 4 of the band.

  // S = Q K^T.
  RA_DEVICE void multiply_keys(float (&scores)[kBands][kKeys / 8][4], uint32_t k_tile) const {
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

  RA_DEVICE void scale(float (&scores)[kBands][kKeys / 8][4]) const {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[b][n][e] = call_.scale.apply<kSoftcap>(scores[b][n][e]);
        }
      }
    }
  }

  // -inf where a row does not see a key. A select: what an unseen key gives may be NaN.
  RA_DEVICE void mask(float (&scores)[kBands][kKeys / 8][4], const KeyRun& run, int from) const {
    const int key = from + threadIdx.x % 4 * 2;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyInterval seen = run.of_query(tile_.query(row_of(b, half)));
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[b][n][2 * half + e];
            score = seen.has(key + 8 * n + e) ? score : -kInfinity;
          }
        }
      }
    }
  }

  // P = 2^(S - m) as the row operand of P V, and l += P. See Note [lazy reference].
  RA_DEVICE void softmax_update(const float (&scores)[kBands][kKeys / 8][4],
                                uint32_t (&probs)[kBands][kKeys / 16][4]) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      float shrink[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = scores[b][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          most = fmaxf(most, fmaxf(scores[b][n][2 * half], scores[b][n][2 * half + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        shrink[half] = state_[b][half].raise(most, Elem::kLazyMax);
      }
      if (__any_sync(kAllLanes, shrink[0] != 1.0f || shrink[1] != 1.0f)) shrink_band(b, shrink);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowState& state = state_[b][half];
        const float reference = state.reference();
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const float low = exp2_approx(scores[b][n][2 * half] - reference);
          const float high = exp2_approx(scores[b][n][2 * half + 1] - reference);
          sum += low + high;
          probs[b][n / 2][n % 2 * 2 + half] = Elem::pack(low, high);
        }
        state.l += sum;
      }
    }
  }

  RA_DEVICE void shrink_band(int b, const float (&shrink)[2]) {
#pragma unroll
    for (int d = 0; d < kV / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_[b][d][e] *= shrink[e / 2];
    }
  }

  // O += P V.
  RA_DEVICE void accumulate(const uint32_t (&probs)[kBands][kKeys / 16][4], uint32_t v_tile) {
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

  // ---- Rows.

  RA_DEVICE int row_of(int band, int half) const {
    return warp_row_ + band * 16 + half * 8 + threadIdx.x % 32 / 4;
  }

  // Calls visit(band, half, row) for this thread's real rows.
  template <typename Visit>
  RA_DEVICE void for_bands(const Visit& visit) const {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (tile_.real(row_of(b, half))) visit(b, half, row_of(b, half));
      }
    }
  }

  // Calls visit(band, half, row, state, each_pair) for them, with l summed over the row's four
  // lanes; each_pair(f) calls f(column, acc, acc of the next column) for this lane's columns.
  template <typename Visit>
  RA_DEVICE void for_rows(const Visit& visit) {
    const int dim = static_cast<int>(call_.params.v_head_dim);
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& l = state_[b][half].l;
        l += __shfl_xor_sync(kAllLanes, l, 1);
        l += __shfl_xor_sync(kAllLanes, l, 2);
      }
    }
    for_bands([&](int b, int half, int row) {
      visit(b, half, row, state_[b][half], [&](auto&& each) {
#pragma unroll
        for (int d = 0; d < kV; d += 8) {
          if (d >= dim) break;
          each(d + static_cast<int>(threadIdx.x % 4) * 2, acc_[b][d / 8][2 * half],
               acc_[b][d / 8][2 * half + 1]);
        }
      });
    });
  }

  const ForwardCall& call_;
  Smem& smem_;
  const QueryTile tile_;
  const KeyPart part_;
  const int warp_row_;
  const bool working_;  // this warp has rows

  int slot_ = 0;  // of the ring, the next to be taken
  float acc_[kBands][kV / 8][4] = {};
  RowState state_[kBands][2];
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
