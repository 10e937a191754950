// SPDX-License-Identifier: BSD-3-Clause
//
// What a forward kernel for 16-bit inputs does with its rows, whatever instructions multiply its
// matrices: scores to P, and O to the state or the output. A warp owns rows of Q and all of their
// S, P and O, in registers, as fragments of m16n8: element e of column n is column
// 8 n + 2 (lane mod 4) + e mod 2 of row 8 (e / 2) + lane / 4 of a band of 16 rows. Those of wgmma's
// m64nN are the same, a band to each of four warps.
//
// O starts from zero and the carried state is added last, so that its way from memory (begun as a
// prefetch) is hidden. Scores and states: state.cuh. A row's result depends on its own interval
// only: key tiles lie on a fixed grid, and what a row does not see adds exact zeros.
#pragma once

#include "forward_call.cuh"

namespace ring_attention::cuda {

// Tile: kRows of Q, kThreads, kWarpRows (a multiple of 16), kKeys of a key tile, kV columns of O.
template <typename Elem, typename Tile, bool kSoftcap>
class ForwardRows {
 protected:
  static constexpr int kBands = Tile::kWarpRows / 16;
  static constexpr int kKeys = Tile::kKeys, kV = Tile::kV;
  using Scores = float[kBands][kKeys / 8][4];
  using Probs = uint32_t[kBands][kKeys / 16][4];  // row operands of P V

 public:
  RA_DEVICE ForwardRows(const ForwardCall& call, const QueryTile& tile)
      : call_(call), tile_(tile), warp_row_(threadIdx.x / 32 * Tile::kWarpRows) {}

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

 protected:
  // ---- Scores.

  RA_DEVICE void scale(Scores& scores) const {
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
  RA_DEVICE void mask(Scores& scores, const KeyRun& run, int from) const {
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

  // Raises the references of a band to where they can take its scores; shrink: by how much O is
  // then to shrink. See Note [lazy reference].
  RA_DEVICE void raise_references(int b, const Scores& scores, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = scores[b][0][2 * half], other = scores[b][0][2 * half + 1];
#pragma unroll
      for (int n = 1; n < kKeys / 8; ++n) {
        most = fmaxf(most, scores[b][n][2 * half]);
        other = fmaxf(other, scores[b][n][2 * half + 1]);
      }
      most = fmaxf(most, other);
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      shrink[half] = state_[b][half].raise(most, Elem::kLazyMax);
    }
  }

  static RA_DEVICE bool any_shrinks(const float (&shrink)[2]) {
    return __any_sync(kAllLanes, shrink[0] != 1.0f || shrink[1] != 1.0f);
  }
  RA_DEVICE void shrink_band(int b, const float (&shrink)[2]) {
#pragma unroll
    for (int d = 0; d < kV / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_[b][d][e] *= shrink[e / 2];
    }
  }

  // S becomes P = 2^(S - m), and l += P.
  RA_DEVICE void exponentiate(int b, Scores& scores) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& state = state_[b][half];
      const float reference = state.reference();
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        float &low = scores[b][n][2 * half], &high = scores[b][n][2 * half + 1];
        low = exp2_approx(low - reference);
        high = exp2_approx(high - reference);
        sum += low + high;
      }
      state.l += sum;
    }
  }
  RA_DEVICE void pack(int b, const Scores& scores, Probs& probs) const {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        probs[b][n / 2][n % 2 * 2 + half] =
            Elem::pack(scores[b][n][2 * half], scores[b][n][2 * half + 1]);
      }
    }
  }

  const ForwardCall& call_;
  const QueryTile tile_;
  const int warp_row_;

  float acc_[kBands][kV / 8][4] = {};
  RowState state_[kBands][2];

 private:
  static RA_DEVICE float* carried(void* data) { return static_cast<float*>(data); }
  static RA_DEVICE void store(float* to, float low, float high) {
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
  }
  RA_DEVICE int64_t flat(int row) const {
    return tile_.flat(row, static_cast<int>(call_.params.heads));
  }

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
};

}  // namespace ring_attention::cuda
