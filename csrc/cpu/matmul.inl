// SPDX-License-Identifier: BSD-3-Clause
//
// The one matrix product of the kernels, A B, held in registers:
//   for each tile of rows x lanes:  for k:  load the lanes of B, broadcast each row of A, multiply
// A is read by broadcasts, so it needs no packing and may be strided either way; B's lanes are
// contiguous. Operands are in units: what one broadcast takes, an element or (for dot product
// instructions) a pair of 16-bit elements that are neighbours in k. What becomes of a finished
// tile is the caller's: a visitor gets its sums while they are still in registers.
#pragma once

#include "elements.h"
#include "problem.h"

namespace ring_attention::cpu {
namespace {

// Note [Arch]. What the algorithms know of an ISA and element type:
//   Elem, State (what is summed), Unit, kPair (elements per unit), V
//   kKeyStep, kDepthStep, kWidthStep   multiples that products want of keys, depth and lanes
//   kMaxVecs, tile_rows(vecs)          register tiles: rows x vectors of lanes
//   forward_shape(dim), backward_shape(dim), kMaxKeyBlock, kMaxPanel   see TileShape
//   kExpTerms, kTransposeColumns, Session (held while a task runs)
//   kScalesQueries: units of Q^T may be scaled when it is loaded, see ScoreUnits
//   load_lanes, broadcast, multiply_add   the three steps of a product
//   transpose, interleave, store_lanes, store_rows   operands, and results (of kPair rows) as these
//   kOwnProduct: with it, own_tiles instead of the register tiles
// This is the part that all fused multiply-add rows share: units are widened elements.
template <typename Element, typename Vector>
struct MultiplyAdd {
  using Elem = Element;
  using State = StateOf<Elem>;
  using Unit = State;
  using V = Vector;
  static constexpr int kPair = 1, kKeyStep = 2, kDepthStep = 1, kWidthStep = V::kLanes;
  static constexpr int kExpTerms = sizeof(Elem) == 2 ? 4 : 6;
  static constexpr bool kTransposeColumns = false, kOwnProduct = false, kScalesQueries = true;
  struct Session {};

  // Pinned: a compiler that folds the load back into every multiply-add is bound by loads.
  static RA_INLINE V load_lanes(const Unit* from) {
    V lanes = V::load(from);
    pin(lanes);
    return lanes;
  }
  static RA_INLINE V broadcast(const Unit* from) { return V::set(*from); }
  static RA_INLINE V multiply_add(V a, V b, V c) { return fma(a, b, c); }
  static RA_INLINE void transpose(const Unit* from, int64_t from_row, Unit* to, int64_t to_row) {
    transpose_block(from, from_row, to, to_row, V{});
  }
  static RA_INLINE void store_lanes(const V* x, Unit* to) { x->store(to); }
  static RA_INLINE void store_rows(const V* x, Unit* to, int64_t) { x->store(to); }
};

// A: element (i, k) at data[i * row + k * unit].
template <typename Unit>
struct Operand {
  const Unit* data;
  int64_t row, unit;

  Operand at(int64_t i, int64_t k) const { return {data + i * row + k * unit, row, unit}; }
};

// B: lane j of row k at data[j / kLaneBlock * block + k * row + j % kLaneBlock]. In blocks, rows of
// one register tile are neighbours: rows a power of two apart would share few cache sets.
constexpr int64_t kLaneBlock = 64;

template <typename Unit>
struct Lanes {
  const Unit* data;
  int64_t row, block = kLaneBlock;

  const Unit* at(int64_t j) const { return data + j / kLaneBlock * block + j % kLaneBlock; }
  Lanes from(int64_t k) const { return {data + k * row, row, block}; }
};

// One register tile: sum[kRows][kVecs * kLanes] = A B.
template <typename Arch, int kRows, int kVecs>
RA_INLINE void multiply_tile(int64_t units, Operand<typename Arch::Unit> a,
                             const typename Arch::Unit* b, int64_t b_row,
                             typename Arch::V (&sum)[kRows][kVecs]) {
  using V = typename Arch::V;
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[i][v] = V::zero();
  }
  const typename Arch::Unit* left = a.data;
#pragma GCC unroll 2
  for (int64_t k = 0; k < units; ++k) {
    V lanes[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) lanes[v] = Arch::load_lanes(b + v * V::kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const V row = Arch::broadcast(left + i * a.row);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[i][v] = Arch::multiply_add(row, lanes[v], sum[i][v]);
    }
    left += a.unit;
    b += b_row;
  }
}

struct PrepareNothing {
  template <int kRows, int kVecs>
  RA_INLINE void operator()(int64_t, int64_t) const {}
};

// Calls visit(sum, i, j) for every tile of A[rows][units] B[units][width], with sum[kRows][kVecs]
// the tile whose first row and lane are i and j: full tiles first, then rows by kTails at a time.
// prepare<kRows, kVecs>(i, j) comes before the product, if that is not the ISA's own. width is a
// multiple of kWidthStep, rows of the last tail.
template <typename Arch, int... kTails, typename Visit, typename Prepare = PrepareNothing>
RA_INLINE void for_tiles(int64_t rows, int64_t width, int64_t units, Operand<typename Arch::Unit> a,
                         Lanes<typename Arch::Unit> b, const Visit& visit,
                         const Prepare& prepare = {}) {
  if constexpr (Arch::kOwnProduct) {
    Arch::own_tiles(rows, width, units, a, b, visit);
  } else {
    using V = typename Arch::V;
    int64_t j = 0;
    const auto columns = [&]<int kVecs>() __attribute__((always_inline)) {
      for (; j + kVecs * V::kLanes <= width; j += kVecs * V::kLanes) {
        int64_t i = 0;
        const auto tiles = [&]<int kRows>() __attribute__((always_inline)) {
          for (; i + kRows <= rows; i += kRows) {
            V sum[kRows][kVecs];
            prepare.template operator()<kRows, kVecs>(i, j);
            multiply_tile<Arch, kRows, kVecs>(units, a.at(i, 0), b.at(j), b.row, sum);
            visit(sum, i, j);
          }
        };
        tiles.template operator()<Arch::tile_rows(kVecs)>();
        (tiles.template operator()<kTails>(), ...);
      }
    };
    columns.template operator()<Arch::kMaxVecs>();
    if constexpr (Arch::kMaxVecs > 3) columns.template operator()<3>();
    if constexpr (Arch::kMaxVecs > 2) columns.template operator()<2>();
    if constexpr (Arch::kMaxVecs > 1) columns.template operator()<1>();
  }
}

// C[rows][width] += factor A[rows][units] B[units][width]. The product is summed from zero and then
// added: with two levels of sums the error stays flat in their number.
template <typename Arch>
__attribute__((noinline)) void multiply_into(int64_t rows, int64_t width, int64_t units,
                                             Operand<typename Arch::Unit> a,
                                             Lanes<typename Arch::Unit> b, typename Arch::State* c,
                                             int64_t c_row, typename Arch::State factor = 1) {
  using V = typename Arch::V;
  const auto add = [&]<int kRows, int kVecs>(V(&sum)[kRows][kVecs], int64_t i, int64_t j)
                       __attribute__((always_inline)) {
#pragma GCC unroll 32
                         for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
                           for (int v = 0; v < kVecs; ++v) {
                             typename Arch::State* to = c + (i + r) * c_row + j + v * V::kLanes;
                             fma(sum[r][v], V::set(factor), V::load(to)).store(to);
                           }
                         }
                       };
  // C comes from afar, and is wanted all at once when the product is done.
  const auto fetch = [&]<int kRows, int kVecs>(int64_t i, int64_t j)
                         __attribute__((always_inline)) {
                           for (int r = 0; r < kRows; ++r) {
                             const typename Arch::State* to = c + (i + r) * c_row + j;
                             for (int v = 0; v < kVecs; ++v)
                               __builtin_prefetch(to + v * V::kLanes, 1);
                           }
                         };
  for_tiles<Arch, 4, 2, 1>(rows, width, units, a, b, add, fetch);
}

}  // namespace
}  // namespace ring_attention::cpu
